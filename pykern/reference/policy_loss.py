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
    clip: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = math.inf,
    kl: str | None = None,
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    rollout_clip: float = 2.0,
    aggregate: str = "token-mean",
    denominator: float | None = None,
    horizon: float | None = None,
    log_ratio_limit: float = math.inf,
    sequence_log_ratio_limit: float = math.inf,
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
    per_token = advantages.shape == logprobs.shape and list(advantages.shape) != [len(pieces)]

    def select(values: Tensor | None, piece) -> Tensor | None:
        return None if values is None else values[piece][valid[piece]]

    sequences = []
    for index, piece in enumerate(pieces):
        logprob = select(logprobs, piece)
        if len(logprob) == 0:
            continue
        advantage = select(advantages, piece) if per_token else advantages[index].expand_as(logprob)
        old = select(old_logprobs, piece)
        log_ratio = (logprob - old).clamp(-log_ratio_limit, log_ratio_limit)
        if ratio == "sequence":
            mean = (logprob - old).mean()
            rho = mean.clamp(max=sequence_log_ratio_limit).exp().expand_as(logprob)
            log_ratio = logprob - old
        else:
            rho = log_ratio.exp()
        bounded = rho.clamp(1 - clip_low, 1 + clip_high)
        dual = torch.zeros_like(rho, dtype=torch.bool)
        if clip == "weight":
            policy = -bounded.detach() * advantage * logprob
            clipped = rho != bounded
        else:
            free, held = -advantage * rho, -advantage * bounded
            clipped = held > free
            policy = torch.where(clipped, held, free)
            if dual_clip != math.inf:
                dual = (advantage < 0) & (policy > -advantage * dual_clip)
                policy = torch.where(dual, -advantage * dual_clip, policy)
        weight = torch.zeros_like(rho)
        if rollout_logprobs is not None:
            weight = (old - select(rollout_logprobs, piece)).exp().clamp(max=rollout_clip)
            policy = policy * weight
        estimate = torch.zeros_like(policy)
        if kl is not None:
            distance = logprob - select(ref_logprobs, piece)
            if kl == "k1":
                estimate = distance
            elif kl == "k2":
                estimate = 0.5 * distance.square()
            else:
                distance = distance.clamp(-kl_log_ratio_limit, kl_log_ratio_limit)
                estimate = (torch.expm1(-distance) + distance).clamp(max=kl_limit)
        sequences.append(
            {
                "policy": policy,
                "kl": estimate,
                "ratio_mean": rho,
                "approx_kl": -log_ratio,
                "clip_fraction": clipped,
                "clip_fraction_low": clipped & (rho < 1 - clip_low),
                "clip_fraction_high": clipped & (rho > 1 + clip_high),
                "dual_clip_fraction": dual,
                "rollout_weight_mean": weight,
            }
        )

    if horizon is None and cu_seqlens is None:
        horizon = max(logprobs.shape[1], 1)

    def together(part: str) -> Tensor:
        if not sequences:
            return logprobs.sum() * 0 if logprobs.numel() == 0 else logprobs.new_zeros(())
        if aggregate == "token-sum":
            return sum(sequence[part].sum() for sequence in sequences)
        if aggregate == "token-mean":
            tokens = sum(len(sequence[part]) for sequence in sequences)
            return sum(sequence[part].sum() for sequence in sequences) / (denominator or tokens)
        one = torch.mean if aggregate == "seq-mean-token-mean" else torch.sum
        total = sum(one(sequence[part]) for sequence in sequences) / (denominator or len(sequences))
        return total / horizon if aggregate == "seq-mean-token-sum-norm" else total

    metrics = {"policy_loss": together("policy").detach(), "kl_loss": (kl_coef * together("kl")).detach()}
    for name in sequences[0] if sequences else ():
        if name != "policy":
            metrics[name] = torch.cat([sequence[name] for sequence in sequences]).to(logprobs.dtype).mean().detach()
    return together("policy") + kl_coef * together("kl"), metrics
