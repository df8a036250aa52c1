"""What group_advantages means, in plain PyTorch. Slow: one group at a time."""

import math

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    component_weights: list[float] | None = None,
    decompose: bool = False,
    transform: str = "none",
    baseline: str = "group_mean",
    scale: str = "none",
    finish: str = "none",
    filter: str = "none",
    eps: float = 1e-6,
    finish_eps: float = 1e-8,
    ddof: int = 1,
    singleton: str = "zero",
    lengths: Tensor | None = None,
    baseline_rewards: Tensor | None = None,
    k: int = 1,
    overlong: tuple[float, float, float] | None = None,
    relative_length: float = 0.0,
    fallback: float = math.inf,
    window: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Advantages [N] in the dtype of rewards, and which rows are kept, bool [N].

    The parts are those of pykern.TRANSFORMS, BASELINES, SCALES, FINISHES and FILTERS. rewards: [N] or [N, K].
    """
    components = rewards[:, None] if rewards.dim() == 1 else rewards
    weights = torch.as_tensor(component_weights or [1.0] * components.shape[1], dtype=components.dtype)
    present = components.isfinite()
    if baseline_rewards is not None:
        present = present & baseline_rewards.isfinite()[:, None]
    penalty = torch.zeros_like(components[:, 0])
    if overlong is not None:
        longest, buffer, factor = overlong
        penalty = (-(lengths - (longest - buffer)) / buffer * factor).clamp(max=0).to(components.dtype)
    total = torch.where(present, weights * components, 0.0).sum(dim=1) + penalty
    counted = present.any(dim=1)

    if decompose:
        parts = [components[:, c] + penalty for c in range(components.shape[1])]
        masks = [present[:, c] for c in range(components.shape[1])]
    else:
        parts, masks, weights = [total], [counted], weights.new_ones(1)
    advantages, signal = torch.zeros_like(total), torch.zeros_like(counted)
    for part, mask, weight in zip(parts, masks, weights):
        centred, factor, has_signal = _scaled(
            part, mask, group_ids, transform, baseline, scale, eps, ddof, singleton, lengths, baseline_rewards, k,
            relative_length, fallback,
        )  # fmt: skip
        advantages += weight * torch.where(mask, centred * factor, 0.0)
        signal |= has_signal

    if finish == "batch_std":
        values = advantages[counted]
        deviation = values.std(correction=ddof) if len(values) > 1 else 1.0
        advantages = (advantages - values.mean()) / (deviation + finish_eps)
        signal &= not bool(values.max() == values.min()) if len(values) else False
    if finish == "token_whiten":
        tokens = torch.repeat_interleave(advantages[counted], lengths[counted].clamp(min=0))
        if len(tokens) == 0 or bool(tokens.max() == tokens.min()):
            signal &= False
        else:
            advantages = (advantages - tokens.mean()) / torch.sqrt(tokens.var(correction=ddof) + finish_eps)
            signal &= lengths > 0

    keep = counted.clone()
    for group in group_ids.unique():
        rows = (group_ids == group) & counted
        if filter == "equal" and rows.sum() > 1:
            keep &= ~(rows & (total[rows].max() == total[rows].min()))
        if filter == "difficulty" and rows.any():
            keep &= ~(rows & ~((window[0] < total[rows].mean()) & (total[rows].mean() < window[1])))
    return torch.where(signal & counted & keep, advantages, 0.0), keep


def _scaled(
    rewards, finite, group_ids, transform, baseline, scale, eps, ddof, singleton, lengths, given, k, relative_length,
    fallback,
):  # fmt: skip
    """Distance from the baseline, its factor, and the rows with a signal."""
    if transform == "min_max" and finite.any():
        low, high = rewards[finite].min(), rewards[finite].max()
        rewards = (rewards - low) / (high - low) if high > low else torch.zeros_like(rewards)
    centred, factor = torch.zeros_like(rewards), torch.ones_like(rewards)
    signal = finite.clone()
    groups = [((group_ids == group) & finite).nonzero().flatten() for group in group_ids.unique()]
    groups = [rows for rows in groups if len(rows)]
    grouped = baseline not in ("none", "given", "batch_mean", "groups_mean") or transform in _GROUP_TRANSFORMS
    means = torch.stack([rewards[rows].mean() for rows in groups]) if groups else rewards.new_zeros(0)
    all_finite = rewards[finite]

    for rows in groups:
        values, n = rewards[rows], len(rows)
        equal = bool(values.max() == values.min())
        if grouped and (equal if n > 1 else singleton == "zero"):
            signal[rows] = False
            continue
        deviation = values.std(correction=ddof) if n > 1 else values.new_ones(())
        if n > 1:
            values = _transformed(values, transform, k, relative_length, None if lengths is None else lengths[rows])
        weights = lengths[rows].to(values.dtype) if lengths is not None else torch.ones_like(values)
        mean = values.mean()
        if baseline == "none" or (grouped and n == 1):
            centred[rows] = values
        elif baseline == "given":
            centred[rows] = values - given[rows]
        elif baseline == "batch_mean":
            centred[rows] = values - all_finite.mean()
        elif baseline == "groups_mean":
            centred[rows] = (mean - means.mean()).expand(n)
        elif baseline == "group_mean":
            centred[rows] = values - mean
        elif baseline == "leave_one_out":
            centred[rows] = values - (values.sum() - values) / (n - 1)
        elif weights.sum() > 0:
            centred[rows] = values - (weights * values).sum() / weights.sum()

        if scale == "group_std":
            factor[rows] = 1 / (deviation + eps)
        elif scale == "leave_one_out_std" and n > 1:
            for row in range(n):
                others = torch.cat([values[:row], values[row + 1 :]])
                other_deviation = others.std(correction=1) if n > 2 else others.new_zeros(())
                if others.max() != others.min():
                    factor[rows[row]] = 1 / (other_deviation + eps)
        elif scale == "token_std" and weights.sum() > 0 and n > 1:
            token_mean = (weights * values).sum() / weights.sum()
            variance = (weights * (values - token_mean).square()).sum() / weights.sum()
            factor[rows] = 1 / (variance.sqrt() + eps)
            if bool((centred[rows] * factor[rows]).abs().max() >= fallback):
                centred[rows], factor[rows] = values - mean, 1 / (deviation + eps)
        elif scale == "group_mean":
            factor[rows] = 1 / (mean + eps) if mean > 0 else 0.0
    if scale == "batch_std":
        factor[:] = 1 / (eps + (all_finite.std(correction=ddof) if len(all_finite) > 1 else 1.0))
    elif scale == "centred_batch_std":
        values = centred[finite]
        factor[:] = 1 / (eps + (values.std(correction=ddof) if len(values) > 1 else 1.0))
    elif scale == "groups_std":
        factor[:] = 1 / (eps + (means.std(correction=ddof) if len(means) > 1 else 1.0))
    elif scale == "nonzero_share":
        nonzero = (all_finite != 0).sum()
        factor[:] = len(all_finite) / nonzero if nonzero else 0.0
    elif scale == "valid_share":
        equal_rows = sum(len(rows) for rows in groups if rewards[rows].max() == rewards[rows].min())
        factor[:] = 1 / ((len(all_finite) - equal_rows) / max(len(all_finite), 1) + eps)
    elif scale == "beta" and groups:
        shares = torch.stack([rewards[rows].mean() if len(rows) > 1 else rewards.new_zeros(()) for rows in groups])
        mean, variance = (shares.mean(), shares.var(correction=1)) if len(groups) > 1 else (0.0, 1.0)
        for rows, share in zip(groups, shares):
            factor[rows] = _inverse_beta_density(share, mean, variance)
    if baseline == "groups_mean" and len(means) and bool(means.max() == means.min()):
        signal[:] = False
    if baseline == "batch_mean" and len(all_finite) and bool(all_finite.max() == all_finite.min()):
        signal[:] = False
    return centred, factor, signal


_GROUP_TRANSFORMS = ("best_gap", "pass_at_k", "pass_at_k_marginal", "relative_length")


def _transformed(values: Tensor, transform: str, k: int, relative_length: float, lengths: Tensor | None) -> Tensor:
    """Transforms that need the rewards of the group; rewards above zero are correct."""
    n = len(values)
    if transform == "relative_length":
        return values - values.mean() * relative_length * lengths / lengths.max().clamp(min=1)
    if transform == "best_gap":
        best = int(values.argmax())
        gap = torch.zeros_like(values)
        gap[best] = values[best] - torch.cat([values[:best], values[best + 1 :]]).max()
        return gap
    if transform in ("pass_at_k", "pass_at_k_marginal"):
        correct = values > 0
        wrong = n - int(correct.sum())
        if transform == "pass_at_k":
            # maxrl: a correct sample gets the chance that k - 1 others drawn beside it are all wrong.
            return torch.where(correct, _choose_ratio(wrong, n - 1, k - 1), 0.0).to(values.dtype)
        of_wrong = k / n * (1 - _choose_ratio(wrong - 1, n - 1, k - 1))
        return torch.where(correct, k / n, of_wrong).to(values.dtype)
    return values


def _choose_ratio(a: int, b: int, k: int) -> float:
    """C(a, k) / C(b, k)"""
    return math.comb(a, k) / math.comb(b, k) if 0 <= k <= b and a >= k else 0.0


def _inverse_beta_density(share: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """1 / density of the Beta prior that the shares of all groups suggest, held to [0, 1e6]; 1 where they are equal."""
    if float(variance) == 0:
        return torch.ones_like(share)
    q = mean * (1 - mean) / variance - 1
    alpha = torch.as_tensor(1 + q * mean / 3).clamp(min=1).to(share)
    beta = torch.as_tensor(1 + q * (1 - mean) / 3).clamp(min=1).to(share)
    log_density = (
        torch.special.xlogy(alpha - 1, share)
        + torch.special.xlogy(beta - 1, 1 - share)
        + torch.lgamma(alpha + beta)
        - torch.lgamma(alpha)
        - torch.lgamma(beta)
    )
    return torch.exp(-log_density).clamp(0, 1e6)


def group_entropy(group_ids: Tensor, answer_ids: Tensor) -> Tensor:
    """Entropy [N] in bits of the answers given in each row's group, float64 (COPO's H)."""
    entropy = torch.zeros(group_ids.shape, dtype=torch.float64)
    for group in group_ids.unique():
        rows = group_ids == group
        share = answer_ids[rows].unique(return_counts=True)[1].double() / rows.sum()
        entropy[rows] = -(share * share.log2()).sum()
    return entropy
