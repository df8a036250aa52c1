"""policy_loss: any row of LOSSES beside a KL estimate, an entropy bonus and an aggregate, in one pass."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import _native
from .checks import (
    check_device,
    check_floats,
    check_like,
    checked_flags,
    checked_numbers,
    checked_offsets,
    constant,
    lookup,
)
from .loss_ops import PolicyLoss
from .losses import (
    AGGREGATES,
    KL_ESTIMATORS,
    KL_GRADIENTS,
    LOSSES,
    METRICS,
    PRESETS,
    RATIOS,
    ROLLOUT_RULES,
    RULES,
    STABILISATIONS,
    Limits,
    Loss,
)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss: str = "grpo",
    ratio: str | None = None,
    clip_low: float | Tensor | None = None,
    clip_high: float | Tensor | None = None,
    ratio_limit: float | None = None,
    dual_clip: float | None = None,
    temperatures: tuple[float, float] | None = None,
    taper: tuple[tuple[float, float], tuple[float, float]] | None = None,
    negative_scale: float | None = None,
    stabilisation_low: float | None = None,
    stabilisation_high: float | None = None,
    keep: Tensor | None = None,
    second_advantages: Tensor | None = None,
    advantage_weights: Tensor | None = None,
    kl: str | None = None,
    kl_gradient: str = "value",
    kl_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    anchor: str | None = None,
    anchor_coef: float | None = None,
    anchor_logprobs: Tensor | None = None,
    anchor_keep: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    rollout_rule: str = "truncate",
    rollout_low: float = 0.0,
    rollout_clip: float = 2.0,
    rollout_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    token_weights: Tensor | None = None,
    aggregate: str | None = None,
    count_empty: bool = False,
    denominator: float | None = None,
    horizon: float | None = None,
    preset: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss to minimise, and metrics, in one pass that also computes the gradients.

    With l the log-probability of a token, d = l - old_logprob, A its advantage, sg(x) a constant of value x, the ratio
    is, by the row's level: exp(d) ("token"); exp of the mean of d over the sequence ("sequence"), of the sum
    ("product"), or of the mean of d clipped to [-clip_low, clip_high] where that lowers sign(A) d, beside the
    sequence's mean advantage ("clipped_sequence"). With c = clamp(ratio, 1 - clip_low, 1 + clip_high), a token's loss
    is, by the row's rule,

    - clip (ppo, grpo, dual_clip, dapo, dr_grpo, bnpo, two_sided, gspo, luspo, gmpo, hapo, clip_cov, kl_cov, lp_reg,
      kdrl, copo, prime_rl): max(-A min(ratio, ratio_limit), -A c), and with dual_clip, where A < 0, at most
      -A dual_clip;
    - weight (cispo, cispo_relative, topr, topr_token, dppo_tv, dppo_kl): -sg(c) A l, for topr c = 1 where A >= 0;
    - log (reinforce, gpg, dro, kimi, redi): -A l;
    - gate (sapo): -A (4 / t) sigmoid(t (ratio - 1)), t = temperatures[0] where A > 0, else temperatures[1];
    - taper (vespo): -sg(exp(r + k log(ratio) - r ratio)) A l, (k, r) = taper[0] where A >= 0, else taper[1].

    Ratios of sequences are differentiated through all their tokens. Beside the rule:

    - A is times negative_scale where negative (redi). With second_advantages the loss is w loss(A) + (1 - w) loss(A2),
      w = advantage_weights (copo).
    - Stabilisation drops tokens (loss 0): "total_variation" (dppo_tv, prime_rl) where exp(l) - exp(old) rises above
      stabilisation_high for A > 0, or falls below -stabilisation_low; "binary_kl" (dppo_kl) where the KL divergence of
      the two-point distributions passes stabilisation_high above the old probability for A > 0, or stabilisation_low
      below it. keep drops the tokens where it is 0.
    - With rollout_logprobs, times w = exp(old_logprob - rollout_logprob), a constant: within [rollout_low,
      rollout_clip] by clamping ("truncate") or by 0 outside ("mask"). vespo takes it into the product instead,
      unbounded. rollout_weights are times the loss as they are.
    - Plus kl_coef times the KL estimate of d = l - ref_logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1, |d|. Its
      gradient is its own ("value"), that of k2 ("straight_through", verl's "+"), or that of ratio * estimate, then its
      value too ("importance", DeepSeek-V3.2; the token's ratio where the loss has a product).
    - Plus anchor_coef times a second estimate where anchor_keep is not 0: against the old policy (dro: A l -
      coef d^2 / 2; kimi; kl_cov; prime_rl, whose kl_tau is half of it), a teacher (kdrl), filtered log-probabilities
      (lp_reg).
    - Minus entropy_coef times entropy, which receives a gradient.

    Where papers and code differ under one name: grpo is the token mean here; its paper's and TRL's are
    aggregate="seq-mean-token-mean" (TRL: count_empty=True). bnpo is TRL's loss of that name, an aggregate; the paper's
    part is in the advantages. cispo has the raw upper bound 1 + clip_high = 5 and no lower one, cispo_relative verl's
    two. topr weighs by the whole trajectory (paper), topr_token by token (ROLL). verl's default configuration bounds
    the weight of its dppo losses by clip_high=2.0, and its geo_mean counts empty rows: gmpo with count_empty=True. gspo
    is differentiated through the mean (TRL); verl's code, the paper's GSPO-token, through each token's own
    log-probability, which is the same where a sequence has one advantage and one rollout weight.

    Aggregates (S: sum over a sequence's tokens, L: its unmasked tokens, sequences with L = 0 counting nowhere unless
    count_empty): "token-mean" sum S / sum L; "token-sum" sum S; "seq-mean-token-sum" mean S; "seq-mean-token-mean"
    mean S / L; "seq-mean-token-sum-norm" mean S / horizon. TRL's normalisers: grpo, sapo: "seq-mean-token-mean",
    count_empty=True; luspo: "seq-mean-token-sum", count_empty=True; bnpo: "token-mean"; dr_grpo:
    "seq-mean-token-sum-norm", count_empty=True, horizon=max_completion_length; dapo, cispo, vespo: "token-mean",
    denominator=num_items_in_batch / processes (each over its accumulation steps).

    Masked tokens may hold NaN or infinities in every input: they are selected away, their gradient is exactly 0. A
    NaN or infinity at an unmasked token shows in the loss. Nothing is clamped unless a preset says so: a ratio that
    overflows, of a log-ratio above 88 in float32, shows there or in the gradient too, unless its advantage is 0.
    Results are the same bit for bit on any number of threads. The metrics are tensors on the same device; nothing waits
    for them.

    Args:
        logprobs: log-probability of each taken token under the policy: padded [B, T], or packed [N] with cu_seqlens.
            float32, float64, bfloat16 or float16; computed in float32, float64 for float64. Only logprobs and entropy
            receive a gradient.
        old_logprobs: the same under the policy that the ratio is against; None stands for logprobs, detached.
        advantages: one per sequence, [B], or per token, of the shape of logprobs. Packed with as many tokens as
            sequences, they are read as per sequence. So are second_advantages, advantage_weights, rollout_weights.
        mask: of the shape of logprobs; a token counts where it is not 0. None: all tokens.
        cu_seqlens: [B + 1] integers from 0 to N, the packed sequences' bounds. On a GPU their values are not checked,
            since that would wait for them.
        loss: a row of LOSSES, which holds the defaults of what follows up to aggregate.
        ratio: replaces the row's level, "token", "sequence" or "product"; clip_low and clip_high are then for you to
            fit to it. Not for rows of a "clipped_sequence".
        clip_low, clip_high: replace the row's; math.inf takes a bound away. A tensor of the shape of logprobs has a
            distance for each token (hapo). clip_high may be as low as -1 where it is a weight's only bound (cispo).
        ratio_limit, dual_clip, temperatures, taper, negative_scale, stabilisation_low, stabilisation_high: replace
            the row's; refused where its rule has no place for them.
        keep, anchor_keep: of the shape of logprobs.
        kl, kl_gradient, kl_coef, ref_logprobs: the KL estimate, and the reference's log-probabilities.
        anchor, anchor_coef, anchor_logprobs: the second estimate; where its row names no other log-probabilities.
        rollout_logprobs, rollout_rule, rollout_low, rollout_clip: log-probabilities as the sampler reported them, and
            the weight's bounds.
        token_weights: of the shape of logprobs, what each token counts in the loss: in place of an aggregate, for
            batches that are cut into several calls; see policy_loss_token_weights.
        count_empty: sequences without an unmasked token count in "seq-mean-...".
        denominator: replaces the number of tokens ("token-mean") or of sequences ("seq-mean-..."), for batches that
            are cut into several calls: pass the count of the whole batch.
        horizon: divisor of "seq-mean-token-sum-norm"; T by default, required when packed.
        preset: a row of PRESETS, a peer's numerical limits. "verl": log-ratios within +-20 in ppo and its kin, cispo,
            sapo and dppo, at most 10 for gspo; k3 within +-20, its value at most 10; dual clip 3 for ppo and its kin.
            "trl", "liger": vespo's clamps (20 and 1e-8). "openrlhf", "slime": k3 at most 10. "roll": dual clip
            1 + 2 clip_low. "nemo": verl's k3. "oat": k3's input within +-40. "prime_rl": none.

    Returns:
        The loss, a scalar (float64 for float64, else float32), and scalars: "policy_loss", "kl_loss", "anchor_loss",
        "entropy_loss" (they add up to the loss), then means over the unmasked tokens: "kl", "anchor" (the estimates,
        unweighted), "entropy", "ratio_mean", "approx_kl" (old_logprob - logprob), "clip_fraction" (tokens whose clip
        is in force), of that "clip_fraction_low" and "clip_fraction_high", "dual_clip_fraction",
        "rollout_weight_mean", "keep_fraction" (tokens that were not dropped). What was not asked for is 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    row = lookup(LOSSES, loss, "loss")
    if ratio is not None:
        row = _with_ratio(row, loss, ratio)
    limits = lookup(PRESETS, preset, "preset")
    limits = limits.losses.get(loss, limits)

    check_floats(logprobs, "logprobs")
    shape = logprobs.shape
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    cu_seqlens, sequences = checked_offsets(cu_seqlens, logprobs, "logprobs")

    def check(tensor: Tensor, name: str, by_sequence: bool = False) -> None:
        check_floats(tensor, name)
        if by_sequence and tensor.shape != shape:
            if list(tensor.shape) != [sequences]:
                raise ValueError(
                    f"{name}: expected one per sequence, [{sequences}], or per token, {list(shape)}, "
                    f"got {list(tensor.shape)}"
                )
            check_device(tensor, name, logprobs, "logprobs")
        else:
            check_like(tensor, name, logprobs, "logprobs")

    def values(tensor: Tensor | None, name: str, by_sequence: bool = False) -> Tensor | None:
        """A checked constant of the type that is computed in."""
        if tensor is None:
            return None
        check(tensor, name, by_sequence)
        return _computed(tensor, dtype, False)

    def flags(tensor: Tensor | None, name: str) -> Tensor | None:
        return checked_flags(tensor, name, logprobs, "logprobs")

    if row.needs:
        given = {
            "anchor_logprobs": anchor_logprobs, "anchor_keep": anchor_keep, "keep": keep,
            "second_advantages": second_advantages, "advantage_weights": advantage_weights,
            "clip_low": clip_low, "clip_high": clip_high,
        }  # fmt: skip
        for name, source in row.needs.items():
            if given[name] is None:
                raise ValueError(f"{name}: loss {loss!r} needs it: {source}")

    low, low_tensor = _clip("clip_low", clip_low, row.clip_low, row, loss)
    high, high_tensor = _clip("clip_high", clip_high, row.clip_high, row, loss)
    if row.ratio != "clipped_sequence":
        low, high = 1.0 - low, 1.0 + high
    else:
        low = -low
    ratio_limit = _number("ratio_limit", ratio_limit, row.ratio_limit, row, loss, ("clip",))
    if not ratio_limit > 0:
        raise ValueError(f"ratio_limit: expected a positive ratio, got {ratio_limit!r}")
    dual_clip = _dual_clip(dual_clip, clip_low, row, limits, loss)
    shapes = _shapes(temperatures, taper, row, loss)
    negative_scale = row.negative_scale if negative_scale is None else negative_scale
    if not negative_scale >= 0:
        raise ValueError(f"negative_scale: expected a factor of at least 0, got {negative_scale!r}")
    if row.stabilisation == "none" and not (stabilisation_low is None and stabilisation_high is None):
        raise ValueError(
            f"stabilisation_low, stabilisation_high: loss {loss!r} drops no tokens by divergence; use keep"
        )
    stabilisation_low = row.stabilisation_low if stabilisation_low is None else stabilisation_low
    stabilisation_high = row.stabilisation_high if stabilisation_high is None else stabilisation_high
    if not (stabilisation_low >= 0 and stabilisation_high >= 0):
        raise ValueError(
            f"stabilisation_low, stabilisation_high: expected at least 0, got {stabilisation_low!r}, "
            f"{stabilisation_high!r}"
        )
    if (second_advantages is None) != (advantage_weights is None):
        raise ValueError("second_advantages: expected beside advantage_weights, got one of the two")
    if second_advantages is not None and row.ratio == "clipped_sequence":
        raise ValueError(f"second_advantages: loss {loss!r} takes one advantage, the mean of each sequence")

    if kl is not None:
        if kl not in KL_ESTIMATORS:
            raise ValueError(f"kl: expected None or one of {', '.join(KL_ESTIMATORS)}, got {kl!r}")
        if ref_logprobs is None:
            raise ValueError(f"ref_logprobs: kl={kl!r} needs the reference's log-probabilities")
    elif ref_logprobs is not None or kl_coef:
        raise ValueError(f"kl: expected one of {', '.join(KL_ESTIMATORS)} beside ref_logprobs and kl_coef, got None")
    if kl_gradient not in KL_GRADIENTS:
        raise ValueError(f"kl_gradient: expected one of {', '.join(KL_GRADIENTS)}, got {kl_gradient!r}")
    anchor = row.anchor if anchor is None else anchor
    old = logprobs if old_logprobs is None else old_logprobs
    if anchor is None:
        if not (anchor_coef is None and anchor_logprobs is None and anchor_keep is None):
            raise ValueError(
                f"anchor: expected one of {', '.join(KL_ESTIMATORS)} beside anchor_logprobs, anchor_keep and "
                f"anchor_coef, got None"
            )
        anchor_coef = 0.0
    else:
        if anchor not in KL_ESTIMATORS:
            raise ValueError(f"anchor: expected None or one of {', '.join(KL_ESTIMATORS)}, got {anchor!r}")
        anchor_coef = row.anchor_coef if anchor_coef is None else anchor_coef
        if anchor_coef is None:
            raise ValueError(f"anchor_coef: loss {loss!r} has no default for the weight of its anchor; pass one")
        if anchor_logprobs is None:
            if row.anchor_to != "old_logprobs":
                raise ValueError(f"anchor_logprobs: anchor={anchor!r} needs log-probabilities to stay near")
            anchor_logprobs = old
    if rollout_rule not in ROLLOUT_RULES:
        raise ValueError(f"rollout_rule: expected one of {', '.join(ROLLOUT_RULES)}, got {rollout_rule!r}")
    if not rollout_clip > 0:
        raise ValueError(f"rollout_clip: expected a positive weight, got {rollout_clip!r}")
    if not 0 <= rollout_low <= rollout_clip:
        raise ValueError(f"rollout_low: expected a weight from 0 to rollout_clip, got {rollout_low!r}")
    if entropy is None and entropy_coef:
        raise ValueError("entropy: entropy_coef needs it; token_logprobs and linear_token_logprobs return it")

    if token_weights is None:
        aggregate, count, horizon = check_aggregate(
            row.aggregate if aggregate is None else aggregate,
            denominator,
            horizon,
            None if cu_seqlens is not None else shape[1],
        )
    else:
        if not (aggregate is None and denominator is None and horizon is None):
            raise ValueError("token_weights: they take the place of aggregate, denominator and horizon; pass one kind")
        aggregate, count, horizon = 0, 0.0, 1.0
    _native.require_kernels(logprobs, "logprobs", "policy_loss_forward", "policy_loss_backward")

    before = (
        values(old, "old_logprobs"),
        values(advantages, "advantages", True),
        flags(mask, "mask"),
        cu_seqlens,
        flags(keep, "keep"),
        values(ref_logprobs, "ref_logprobs"),
        values(anchor_logprobs, "anchor_logprobs"),
        flags(anchor_keep, "anchor_keep"),
        values(rollout_logprobs, "rollout_logprobs"),
        values(rollout_weights, "rollout_weights", True),
    )
    after = (
        values(low_tensor, "clip_low"),
        values(high_tensor, "clip_high"),
        values(second_advantages, "second_advantages", True),
        values(advantage_weights, "advantage_weights", True),
        values(token_weights, "token_weights"),
        [
            RATIOS.index(row.ratio),
            RULES.index(row.rule),
            int(row.weight_negative_only),
            STABILISATIONS.index(row.stabilisation),
            0 if kl is None else 1 + KL_ESTIMATORS.index(kl),
            KL_GRADIENTS.index(kl_gradient),
            0 if anchor is None else 1 + KL_ESTIMATORS.index(anchor),
            ROLLOUT_RULES.index(rollout_rule),
            aggregate,
            int(count_empty),
        ],
        [
            float(low),
            float(high),
            float(ratio_limit),
            float(dual_clip),
            *shapes,
            float(negative_scale),
            float(stabilisation_low),
            float(stabilisation_high),
            limits.log_ratio,
            limits.sequence_log_ratio_low,
            limits.sequence_log_ratio_high,
            float(kl_coef),
            limits.kl_log_ratio,
            limits.kl,
            float(anchor_coef),
            float(rollout_low),
            float(rollout_clip),
            float(entropy_coef),
            count,
            horizon,
        ],
    )
    if entropy is not None:
        check(entropy, "entropy")
    differentiable = torch.is_grad_enabled() and (
        logprobs.requires_grad or (entropy is not None and entropy.requires_grad)
    )
    logprobs, entropy = _computed(logprobs, dtype, differentiable), _computed(entropy, dtype, differentiable)
    if differentiable:
        value, metrics = PolicyLoss.apply(logprobs, entropy, *before, *after)
    else:
        value, _, _, metrics = torch.ops.pykern.policy_loss_forward.default(logprobs, *before, entropy, *after, False)
    return value, dict(zip(METRICS, metrics.unbind()))


def policy_loss_token_weights(
    logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregate: str = "token-mean",
    count_empty: bool = False,
    denominator: float | None = None,
    horizon: float | None = None,
) -> Tensor:
    """What each token counts in an aggregate of policy_loss: the loss is the sum of token losses times these.

    A batch whose tokens go through several calls of policy_loss takes them, cut alike, as token_weights; the losses of
    the calls then add up to that of the whole batch. (A ratio of sequences needs whole sequences in each call.)

    Args:
        logprobs: [B, T], or [N] with cu_seqlens: only shape, type and device are used.
        mask, cu_seqlens, aggregate, count_empty, denominator, horizon: as in policy_loss.

    Returns:
        A tensor of the shape of logprobs, 0 at masked tokens; float64 for float64, else float32.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_floats(logprobs, "logprobs")
    cu_seqlens, _ = checked_offsets(cu_seqlens, logprobs, "logprobs")
    mask = checked_flags(mask, "mask", logprobs, "logprobs")
    columns = None if cu_seqlens is not None else logprobs.shape[1]
    index, count, horizon = check_aggregate(aggregate, denominator, horizon, columns)
    _native.require_kernels(logprobs, "logprobs", "policy_loss_token_weights")
    return torch.ops.pykern.policy_loss_token_weights.default(
        constant(logprobs), mask, cu_seqlens, index, count_empty, count, horizon
    )


def check_aggregate(
    aggregate: str, denominator: float | None, horizon: float | None, columns: int | None
) -> tuple[int, float, float]:
    """Index of the aggregate, its denominator (0: counted) and its horizon; `columns` of a padded batch."""
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate: expected one of {', '.join(AGGREGATES)}, got {aggregate!r}")
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator: expected a positive count, got {denominator!r}")
    if aggregate == "seq-mean-token-sum-norm" and horizon is None:
        if columns is None:
            raise ValueError(f"horizon: {aggregate!r} of packed sequences needs it, the longest response allowed")
        horizon = max(columns, 1)
    if horizon is not None and not horizon > 0:
        raise ValueError(f"horizon: expected a positive number of tokens, got {horizon!r}")
    return AGGREGATES.index(aggregate), float(denominator or 0.0), 1.0 if horizon is None else float(horizon)


def _computed(tensor: Tensor | None, dtype: torch.dtype, differentiable: bool) -> Tensor | None:
    if tensor is None:
        return None
    if not differentiable and tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def _clip(name: str, given: float | Tensor | None, default: float, row: Loss, loss: str) -> tuple[float, Tensor | None]:
    """A bound's distance for all tokens, and that of each token if it was given as a tensor."""
    if given is None:
        return default, None
    if row.rule not in ("clip", "weight") and row.ratio != "clipped_sequence":
        raise ValueError(f"{name}: loss {loss!r} clips no ratio")
    if isinstance(given, Tensor):
        return 0.0, given
    # A weight's only bound may lie anywhere above 0.
    least = -1.0 if name == "clip_high" and row.rule == "weight" and row.clip_low == math.inf else 0.0
    if not given >= least:
        raise ValueError(f"{name}: expected a distance from 1 of at least {least:g}, got {given!r}")
    return given, None


def _with_ratio(row: Loss, loss: str, ratio: str) -> Loss:
    levels = [level for level in RATIOS if level != "clipped_sequence"]
    if ratio not in levels:
        raise ValueError(f"ratio: expected None or one of {', '.join(levels)}, got {ratio!r}")
    if row.ratio not in levels:
        raise ValueError(f"ratio: loss {loss!r} has no place for it, its ratio is {row.ratio!r}")
    return replace(row, ratio=ratio)


def _number(name: str, given: float | None, default: float, row: Loss, loss: str, rules: tuple[str, ...]) -> float:
    if given is None:
        return default
    if row.rule not in rules:
        raise ValueError(f"{name}: loss {loss!r} has no place for it, its rule is {row.rule!r}")
    return given


def _dual_clip(given: float | None, clip_low: float | Tensor | None, row: Loss, limits: Limits, loss: str) -> float:
    value = _number("dual_clip", given, row.dual_clip, row, loss, ("clip",))
    if given is None:
        if limits.dual_clip is not None:
            value = min(value, limits.dual_clip)
        if limits.dual_clip_per_clip is not None:
            low = clip_low if isinstance(clip_low, (int, float)) else row.clip_low
            value = min(value, 1.0 + limits.dual_clip_per_clip * low)
    if not value > 1:
        raise ValueError(f"dual_clip: expected a ratio above 1, got {value!r}")
    return value


def _shapes(temperatures, taper, row: Loss, loss: str) -> tuple[float, float, float, float]:
    """The four numbers of a gate or a taper."""
    temperatures = _number("temperatures", temperatures, row.temperatures, row, loss, ("gate",))
    taper = _number("taper", taper, row.taper, row, loss, ("taper",))
    if row.rule == "gate":
        positive, others = checked_numbers(temperatures, "temperatures", "where A > 0", "elsewhere")
        if not (positive > 0 and others > 0):
            raise ValueError(f"temperatures: expected two positive numbers, got {temperatures!r}")
        return positive, others, 0.0, 0.0
    if row.rule == "taper":
        if not isinstance(taper, Sequence) or len(taper) != 2:
            raise ValueError(f"taper: expected two pairs (power, rate) of at least 0, got {taper!r}")
        numbers = [number for pair in taper for number in checked_numbers(pair, "taper", "power", "rate")]
        if not all(number >= 0 for number in numbers):
            raise ValueError(f"taper: expected two pairs (power, rate) of at least 0, got {taper!r}")
        return tuple(numbers)
    return 0.0, 0.0, 0.0, 0.0
