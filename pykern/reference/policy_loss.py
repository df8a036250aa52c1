"""What policy_loss means, in plain PyTorch under autograd: padded, or one sequence after the other."""

import math

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ratio: str = "token",
    rule: str = "clip",
    stabilisation: str = "none",
    clip_low: float | Tensor = 0.2,
    clip_high: float | Tensor = 0.2,
    ratio_limit: float = math.inf,
    dual_clip: float = math.inf,
    shape: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    weight_negative_only: bool = False,
    negative_scale: float = 1.0,
    stabilisation_low: float = math.inf,
    stabilisation_high: float = math.inf,
    keep: Tensor | None = None,
    second_advantages: Tensor | None = None,
    advantage_weights: Tensor | None = None,
    kl: str | None = None,
    kl_gradient: str = "value",
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    anchor: str | None = None,
    anchor_coef: float = 0.0,
    anchor_logprobs: Tensor | None = None,
    anchor_keep: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    rollout_rule: str = "truncate",
    rollout_low: float = 0.0,
    rollout_high: float = 2.0,
    rollout_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    token_weights: Tensor | None = None,
    aggregate: str = "token-mean",
    count_empty: bool = False,
    denominator: float | None = None,
    horizon: float | None = None,
    log_ratio_limit: float = math.inf,
    sequence_log_ratio_low: float = -math.inf,
    sequence_log_ratio_high: float = math.inf,
    kl_log_ratio_limit: float = math.inf,
    kl_limit: float = math.inf,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its metrics, every part by name; pykern.policy_loss takes them from its tables."""
    valid = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        pieces = [slice(begin, end) for begin, end in zip(bounds, bounds[1:])]
    else:
        pieces = list(range(logprobs.shape[0]))

    def select(values, index: int):
        """The unmasked tokens' values of a sequence, of something that is per token, per sequence or one for all."""
        if not isinstance(values, Tensor):
            return values
        piece = pieces[index]
        if values.shape == logprobs.shape and list(values.shape) != [len(pieces)]:
            return values[piece][valid[piece]]
        return values[index].expand_as(logprobs[piece][valid[piece]])

    sequences = []
    for index in range(len(pieces)):
        logprob, old = select(logprobs, index), select(old_logprobs, index)
        if len(logprob) == 0:
            continue
        advantage = select(advantages, index)
        distance = logprob - old
        log_ratio = distance.clamp(-log_ratio_limit, log_ratio_limit)
        low, high = select(clip_low, index), select(clip_high, index)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low, high = (torch.as_tensor(bound, dtype=logprob.dtype).expand_as(logprob) for bound in (low, high))

        # The ratio: of the token; or one of the sequence, from the mean or the sum of its log-ratios.
        clipped_log = torch.zeros_like(valid[pieces[index]][valid[pieces[index]]])
        if ratio == "token":
            rho = log_ratio.exp()
        elif ratio == "sequence":
            rho = distance.mean().clamp(sequence_log_ratio_low, sequence_log_ratio_high).exp().expand_as(logprob)
        elif ratio == "product":
            total = log_ratio.sum()
            if rule == "taper" and rollout_logprobs is not None:
                total = total + (old - select(rollout_logprobs, index)).clamp(-log_ratio_limit, log_ratio_limit).sum()
            rho = total.clamp(sequence_log_ratio_low, sequence_log_ratio_high).exp().expand_as(logprob)
        else:
            # "clipped_sequence": log-ratios are clipped to [-low, high] where that lowers sign(A) times them.
            sign = torch.where(advantage < 0, -1.0, 1.0).to(logprob.dtype)
            bounded_log = distance.clamp(-low, high)
            clipped_log = sign * bounded_log < sign * distance
            rho = torch.where(clipped_log, bounded_log, distance).mean().exp().expand_as(logprob)
            advantage, low, high = advantage.mean().expand_as(advantage), math.inf, math.inf

        def by_sign(condition, chosen: float, otherwise: float) -> Tensor:
            return torch.where(condition, torch.full_like(rho, chosen), torch.full_like(rho, otherwise))

        def term(advantage):
            """Loss of each token, where its clip is in force, and where its dual clip is."""
            clipped = dual = torch.zeros_like(advantage, dtype=torch.bool)
            advantage = torch.where(advantage < 0, advantage * negative_scale, advantage)
            bounded = rho.clamp(1 - low, 1 + high) if ratio != "clipped_sequence" else rho
            if rule == "weight":
                weight, clipped = bounded.detach(), rho != bounded
                if weight_negative_only:
                    weight = torch.where(advantage < 0, weight, torch.ones_like(weight))
                    clipped = clipped & (advantage < 0)
                return -weight * advantage * logprob, clipped, dual
            if rule == "log":
                return -advantage * logprob, clipped, dual
            if rule == "gate":
                temper = by_sign(advantage > 0, shape[0], shape[1])
                return -advantage * 4 / temper * torch.sigmoid(temper * (rho - 1)), clipped, dual
            if rule == "taper":
                power = by_sign(advantage < 0, shape[2], shape[0])
                rate = by_sign(advantage < 0, shape[3], shape[1])
                taper = (rate + power * rho.log() - rate * rho).exp().detach()
                return -taper * advantage * logprob, clipped, dual
            free, held = -advantage * rho.clamp(max=ratio_limit), -advantage * bounded
            clipped = held > free
            loss = torch.where(clipped, held, free)
            if dual_clip != math.inf:
                dual = (advantage < 0) & (loss > -advantage * dual_clip)
                loss = torch.where(dual, -advantage * dual_clip, loss)
            return loss, clipped, dual

        policy, clipped, dual = term(advantage)
        if second_advantages is not None:
            share = select(advantage_weights, index)
            policy = share * policy + (1 - share) * term(select(second_advantages, index))[0]

        kept = torch.ones_like(clipped) if keep is None else select(keep, index) != 0
        if stabilisation != "none":
            p, p_old = logprob.detach().exp(), old.exp()
            if stabilisation == "total_variation":
                stays = torch.where(advantage > 0, p - p_old <= stabilisation_high, p - p_old >= -stabilisation_low)
            else:
                divergence = (
                    p_old * (old - logprob.detach()) + (1 - p_old) * ((1 - p_old + 1e-8) / (1 - p + 1e-8)).log()
                )
                stays = torch.where(
                    advantage > 0,
                    (divergence <= stabilisation_high) | (p <= p_old),
                    (divergence <= stabilisation_low) | (p >= p_old),
                )
            kept = kept & stays
        weight = torch.zeros_like(rho)
        if rollout_logprobs is not None and not (rule == "taper" and ratio == "product"):
            weight = (old - select(rollout_logprobs, index)).exp()
            if rollout_rule == "truncate":
                weight = weight.clamp(rollout_low, rollout_high)
            else:
                weight = torch.where((weight >= rollout_low) & (weight <= rollout_high), weight, 0.0)
            policy = policy * weight
        if rollout_weights is not None:
            weight = select(rollout_weights, index)
            policy = policy * weight
        policy = torch.where(kept, policy, 0.0)

        estimate = torch.zeros_like(policy)
        if kl is not None:
            estimate = _divergence(kl, logprob - select(ref_logprobs, index), kl_log_ratio_limit, kl_limit)
            if kl_gradient == "straight_through":
                # The value of the estimate with the gradient of k2.
                square = 0.5 * (logprob - select(ref_logprobs, index)).square()
                estimate = square - square.detach() + estimate.detach()
            elif kl_gradient == "importance":
                # A product over the sequence is no weight for a token's estimate: that takes the token's ratio.
                estimate = (log_ratio.exp() if ratio == "product" else rho) * estimate
        anchored = torch.zeros_like(policy)
        if anchor is not None:
            anchored = _divergence(anchor, logprob - select(anchor_logprobs, index), math.inf, math.inf)
            if anchor_keep is not None:
                anchored = torch.where(select(anchor_keep, index) != 0, anchored, 0.0)
        is_low = (rho < 1 - low) if ratio != "clipped_sequence" else (distance < 0)
        clipped = clipped | clipped_log
        sequences.append(
            {
                "policy": policy,
                "kl": estimate,
                "anchor": anchored,
                "entropy": torch.zeros_like(policy) if entropy is None else select(entropy, index),
                "weights": torch.ones_like(policy) if token_weights is None else select(token_weights, index),
                "ratio_mean": rho,
                "approx_kl": -(log_ratio if ratio == "token" else distance),
                "clip_fraction": clipped,
                "clip_fraction_low": clipped & is_low,
                "clip_fraction_high": clipped & ~is_low,
                "dual_clip_fraction": dual,
                "rollout_weight_mean": weight,
                "keep_fraction": kept,
            }
        )

    if horizon is None and cu_seqlens is None:
        horizon = max(logprobs.shape[1], 1)

    def together(part: str) -> Tensor:
        if not sequences:
            return logprobs.sum() * 0 if logprobs.numel() == 0 else logprobs.new_zeros(())
        if token_weights is not None:
            return sum((sequence["weights"] * sequence[part]).sum() for sequence in sequences)
        if aggregate == "token-sum":
            return sum(sequence[part].sum() for sequence in sequences)
        if aggregate == "token-mean":
            tokens = sum(len(sequence[part]) for sequence in sequences)
            return sum(sequence[part].sum() for sequence in sequences) / (denominator or tokens)
        one = torch.mean if aggregate == "seq-mean-token-mean" else torch.sum
        count = denominator or (len(pieces) if count_empty else len(sequences))
        total = sum(one(sequence[part]) for sequence in sequences) / count
        return total / horizon if aggregate == "seq-mean-token-sum-norm" else total

    parts = {
        "policy_loss": together("policy"),
        "kl_loss": kl_coef * together("kl"),
        "anchor_loss": anchor_coef * together("anchor"),
        "entropy_loss": -entropy_coef * together("entropy"),
    }
    metrics = {name: value.detach() for name, value in parts.items()}
    for name in sequences[0] if sequences else ():
        if name not in ("policy", "weights"):
            metrics[name] = torch.cat([sequence[name] for sequence in sequences]).to(logprobs.dtype).mean().detach()
    return sum(parts.values()), metrics


def _divergence(kind: str, distance: Tensor, distance_limit: float, limit: float) -> Tensor:
    """k1, k2, k3 or the absolute value of a log-ratio; the limits are k3's."""
    if kind == "k1":
        return distance
    if kind == "k2":
        return 0.5 * distance.square()
    if kind == "abs":
        return distance.abs()
    distance = distance.clamp(-distance_limit, distance_limit)
    return (torch.expm1(-distance) + distance).clamp(max=limit)
