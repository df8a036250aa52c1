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
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Advantages [N] in the dtype of rewards, which rows are kept, bool [N], and the counts of METRICS.

    The parts are those of pykern.TRANSFORMS, BASELINES, SCALES, FINISHES and FILTERS. rewards: [N] or [N, K].

    In this order: components that are not finite are left out, and a row without any with them; overlong responses
    pay; a filter looks at the weighted sum of the components and takes its groups out of all that follows; then for
    that sum, or with `decompose` for each component, the transform replaces the rewards, and baseline and scale see
    what it left (group_std after best_gap excepted: it is that of the rewards); the finish looks at the results.
    """
    components = rewards[:, None] if rewards.dim() == 1 else rewards
    weights = torch.as_tensor(component_weights or [1.0] * components.shape[1], dtype=components.dtype)
    weights = weights.to(components.device)
    present = components.isfinite()
    if baseline == "given":
        present = present & baseline_rewards.isfinite()[:, None]
    lengths = None if lengths is None else lengths.clamp(min=0)
    penalty = torch.zeros_like(components[:, 0])
    if overlong is not None:
        longest, buffer, factor = overlong
        beyond = lengths.to(components.dtype) - (longest - buffer)
        penalty = (-beyond / buffer * factor).clamp(max=0)
    total = torch.where(present, weights * components, 0.0).sum(dim=1) + penalty
    counted = present.any(dim=1)
    keep, counts = _filtered(total, counted, group_ids, filter, window)
    counts["missing"] = int((~present[counted]).sum())

    if decompose:
        parts = [components[:, c] + penalty for c in range(components.shape[1])]
        masks = [present[:, c] & keep for c in range(components.shape[1])]
    else:
        parts, masks, weights = [total], [keep], weights.new_ones(1)
    advantages, signal = torch.zeros_like(total), torch.zeros_like(keep)
    for part, mask, weight in zip(parts, masks, weights):
        centred, factor, has_signal = _scaled(
            part, mask, group_ids, transform, baseline, scale, eps, ddof, singleton, lengths, baseline_rewards, k,
            relative_length, fallback,
        )  # fmt: skip
        advantages += torch.where(has_signal, weight * centred * factor, 0.0)
        signal |= has_signal

    if finish == "batch_std":
        values = advantages[keep]
        if len(values) == 0 or bool(values.max() == values.min()):
            signal &= False
        else:
            advantages = (advantages - values.mean()) / (values.std(correction=ddof) + finish_eps)
    if finish == "token_whiten":
        tokens = torch.repeat_interleave(advantages[keep], lengths[keep])
        if len(tokens) == 0 or bool(tokens.max() == tokens.min()):
            signal &= False
        else:
            advantages = (advantages - tokens.mean()) / torch.sqrt(tokens.var(correction=ddof) + finish_eps)
            signal &= lengths > 0
    return torch.where(signal, advantages, 0.0), keep, counts


def _filtered(
    total: Tensor, counted: Tensor, group_ids: Tensor, filter: str, window: tuple[float, float]
) -> tuple[Tensor, dict[str, int]]:
    """Rows that take part, and the counts. A group of one is never filtered as equal."""
    keep = counted.clone()
    counts = {"non_finite": int((~counted).sum()), "missing": 0, "groups": 0, "equal_groups": 0, "singletons": 0}
    for group in group_ids.unique():
        rows = (group_ids == group) & counted
        values = total[rows]
        equal = len(values) > 1 and bool(values.max() == values.min())
        counts["groups"] += 1
        counts["equal_groups"] += equal
        counts["singletons"] += len(values) == 1
        outside = len(values) > 0 and not bool(window[0] < values.mean() < window[1])
        if (filter == "equal" and equal) or (filter == "difficulty" and outside):
            keep &= ~rows
    return keep, counts | {"filtered": int((counted & ~keep).sum())}


_GROUP_TRANSFORMS = (
    "best_gap", "pass_at_k", "pass_at_k_marginal", "relative_length", "pass_at_k_leave_one_out", "pass_at_k_minus_one",
)  # fmt: skip
_GROUP_BASELINES = ("group_mean", "leave_one_out", "length_weighted")
_GROUP_SCALES = ("group_std", "leave_one_out_std", "token_std", "group_mean", "beta")


def _scaled(
    rewards, part, group_ids, transform, baseline, scale, eps, ddof, singleton, lengths, given, k, relative_length,
    fallback,
):  # fmt: skip
    """Distance from the baseline, its factor, and the rows with a signal; `part`: the rows that take part."""
    centred, factor, signal = torch.zeros_like(rewards), torch.ones_like(rewards), part.clone()
    if not part.any():
        return centred, factor, signal
    rewards = torch.where(part, rewards, 0.0)
    if transform == "min_max":
        low, high = rewards[part].min(), rewards[part].max()
        rewards = (rewards - low) / (high - low) if high > low else torch.zeros_like(rewards)
    raw = rewards
    groups = [((group_ids == group) & part).nonzero().flatten() for group in group_ids[part].unique()]
    if transform in _GROUP_TRANSFORMS:
        rewards = rewards.clone()
        for rows in groups:
            if len(rows) > 1:
                rewards[rows] = _transformed(raw[rows], transform, k, relative_length, lengths, rows)
    grouped = baseline in _GROUP_BASELINES or scale in _GROUP_SCALES or transform in _GROUP_TRANSFORMS
    # Where tokens weigh the rewards, a row without any does not enter the statistics.
    by_length = baseline == "length_weighted" or scale == "token_std"
    weight = lengths.to(rewards.dtype) if by_length else torch.ones_like(rewards)
    means = torch.stack([_mean(rewards[rows]) for rows in groups])
    batch, batch_mean = rewards[part], _mean(rewards[part])
    batch_equal, means_equal = bool(batch.max() == batch.min()), bool(means.max() == means.min())

    for rows, mean in zip(groups, means):
        values, w, n = rewards[rows], weight[rows], len(rows)
        entering = values[w > 0]
        if grouped and (singleton == "zero" if n == 1 else len(entering) == 0 or entering.max() == entering.min()):
            signal[rows] = False
            continue
        deviation = (raw if transform == "best_gap" else rewards)[rows].std(correction=ddof) if n > 1 else 1.0
        if baseline == "none" or (baseline in _GROUP_BASELINES and n == 1):
            centred[rows] = values
        elif baseline == "given":
            centred[rows] = values - given[rows]
        elif baseline == "batch_mean":
            centred[rows] = values - batch_mean
        elif baseline == "groups_mean":
            centred[rows] = mean - _mean(means)
        elif baseline == "group_mean":
            centred[rows] = values - mean
        elif baseline == "leave_one_out":
            centred[rows] = values - (values.sum() - values) / (n - 1)
        elif baseline == "length_weighted":
            centred[rows] = values - (w * values).sum() / w.sum()

        if scale == "group_std" or (n == 1 and scale in ("leave_one_out_std", "token_std")):
            factor[rows] = 1 / (deviation + eps)
        elif scale == "leave_one_out_std":
            for row in range(n):
                others = torch.cat([values[:row], values[row + 1 :]])
                if others.max() != others.min():
                    factor[rows[row]] = 1 / (others.std(correction=1) + eps)
        elif scale == "token_std":
            token_mean = (w * values).sum() / w.sum()
            variance = (w * (values - token_mean).square()).sum() / w.sum()
            factor[rows] = 1 / (variance.sqrt() + eps)
            if bool((centred[rows] * factor[rows]).abs().max() >= fallback):
                centred[rows], factor[rows] = values - mean, 1 / (deviation + eps)
        elif scale == "group_mean":
            factor[rows] = 1 / (mean + eps) if mean > 0 else 0.0
    if scale == "batch_std":
        factor[:] = 1 / (_deviation(batch, ddof) + eps)
        signal &= len(batch) == 1 or not batch_equal
    elif scale == "centred_batch_std":
        values = centred[part]
        factor[:] = 1 / (_deviation(values, ddof) + eps)
        signal &= len(values) == 1 or bool(values.max() != values.min())
    elif scale == "groups_std":
        factor[:] = 1 / (_deviation(means, ddof) + eps)
        signal &= len(means) == 1 or not means_equal
    elif scale == "nonzero_share":
        nonzero = int((batch != 0).sum())
        factor[:] = len(batch) / nonzero if nonzero else 0.0
    elif scale == "valid_share":
        differ = [singleton == "self" if len(r) == 1 else bool(rewards[r].max() > rewards[r].min()) for r in groups]
        valid = sum(len(rows) for rows, is_valid in zip(groups, differ) if is_valid)
        factor[:] = 1 / (valid / len(batch) + eps) if valid else 0.0
    elif scale == "beta":
        shares = torch.stack([mean if len(rows) > 1 else torch.zeros_like(mean) for rows, mean in zip(groups, means)])
        shares = shares.clamp(0, 1)
        mean, variance = 0.0, 1.0
        if len(groups) > 1:
            mean = _mean(shares)
            variance = (shares - mean).square().sum() / (len(groups) - 1)
        for rows, share in zip(groups, shares):
            factor[rows] = _inverse_beta_density(share, mean, variance)
    signal &= not (baseline == "groups_mean" and means_equal) and not (baseline == "batch_mean" and batch_equal)
    return centred, factor, signal


def _mean(values: Tensor) -> Tensor:
    """Within the range of the values, which rounding might leave."""
    return values.mean().clamp(values.min(), values.max())


def _deviation(values: Tensor, ddof: int) -> Tensor:
    return values.std(correction=ddof) if len(values) > 1 else values.new_ones(())


def _transformed(
    values: Tensor, transform: str, k: int, relative_length: float, lengths: Tensor | None, rows: Tensor
) -> Tensor:
    """Transforms that need the rewards of the group; rewards above zero are correct."""
    n = len(values)
    if transform == "relative_length":
        length = lengths[rows].to(values.dtype)
        return values - _mean(values) * relative_length * (length / length.max().clamp(min=1))
    if transform == "best_gap":
        best = int(values.argmax())
        gap = torch.zeros_like(values)
        gap[best] = values[best] - torch.cat([values[:best], values[best + 1 :]]).max()
        return gap
    correct = values > 0
    wrong = n - int(correct.sum())
    # Of k drawn with a correct sample, or with a wrong one: the chance that the k - 1 others are all wrong.
    beside_correct, beside_wrong = _choose_ratio(wrong, n - 1, k - 1), _choose_ratio(wrong - 1, n - 1, k - 1)
    # Of k drawn without it: the chance that all are wrong.
    without_correct, without_wrong = _choose_ratio(wrong, n - 1, k), _choose_ratio(wrong - 1, n - 1, k)
    share = k / n
    of_correct, of_wrong = {
        "pass_at_k": (beside_correct, 0.0),
        "pass_at_k_marginal": (share, share * (1 - beside_wrong)),
        "pass_at_k_leave_one_out": (
            share - k / (n - 1) * (1 - without_correct),
            share * (1 - beside_wrong) - k / (n - 1) * (1 - without_wrong),
        ),
        "pass_at_k_minus_one": (share * beside_correct, 0.0),
    }[transform]
    return torch.where(correct, values.new_tensor(of_correct), values.new_tensor(of_wrong))


def _choose_ratio(a: int, b: int, k: int) -> float:
    """C(a, k) / C(b, k); 0 where there is no choice of k."""
    return math.comb(a, k) / math.comb(b, k) if 0 <= k <= min(a, b) else 0.0


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


def group_entropy(group_ids: Tensor, answer_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy [N] in bits of the answers given in each row's group, float64 (COPO's H), and the size of that group."""
    entropy, sizes = torch.zeros(group_ids.shape, dtype=torch.float64), torch.zeros_like(group_ids)
    for group in group_ids.unique():
        rows = group_ids == group
        share = answer_ids[rows].unique(return_counts=True)[1].double() / rows.sum()
        entropy[rows], sizes[rows] = (share * share.log2()).sum().abs(), rows.sum()
    return entropy, sizes
