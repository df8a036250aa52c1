"""What risk_advantages means, in plain PyTorch. Slow: one bundle at a time."""

import torch
from torch import Tensor


def risk_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    bundle_ids: Tensor,
    *,
    levels: tuple[float, float] = (0.2, 0.8),
    mix: float | None = 1.5,
    upper_tail: float | None = None,
    tracked: Tensor | None = None,
    tracking: str = "mix",
    credit: str = "uniform",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Advantages [N], and [N] the score of each paper at the row of its first response, NaN elsewhere."""
    low_level, high_level = levels
    advantages, papers = torch.zeros_like(rewards), torch.full_like(rewards, float("nan"))
    finite = rewards.isfinite()
    for bundle in bundle_ids.unique():
        of_bundle = (bundle_ids == bundle) & finite
        groups = list(dict.fromkeys(group_ids[of_bundle].tolist()))
        if not groups:
            continue
        prompts = [(of_bundle & (group_ids == group)).nonzero().flatten() for group in groups]
        count = min(len(rows) for rows in prompts)
        scores = torch.stack([rewards[rows[:count]] for rows in prompts]).sum(0)
        papers[prompts[0][:count]] = scores
        if count > 1 and bool(scores.max() == scores.min()):
            continue
        quantiles = scores.quantile(torch.tensor(levels, dtype=rewards.dtype, device=scores.device))
        if tracked is not None:
            joint = tracked.to(rewards.dtype)
            joint = joint if tracking == "track" else (joint + quantiles) / 2
            quantiles = torch.where(joint.isnan(), quantiles, joint)
        low, high = quantiles
        utility = ((scores - low).relu() - (scores - high).relu() + (low - high)) / (high_level - low_level + eps)
        if mix is not None:
            utility = (mix * -(low - scores).relu() / (low_level + eps) + utility) / (mix + 1)
        if upper_tail is not None:
            tail = (scores - high).relu() / (1 - high_level + eps)
            utility = (upper_tail * tail + utility) / (upper_tail + 1)
        utility = utility / ((scores.std() if count > 1 else 1.0) + eps)
        distances = torch.stack([rewards[rows[:count]] - rewards[rows].mean() for rows in prompts])
        total = distances.sum(0)
        for rows, distance in zip(prompts, distances):
            share = utility
            if credit == "score":
                share = torch.where(rewards[rows[:count]] > 0, 0.5, 1.5) * utility
            elif credit == "std":
                deviation = rewards[rows].std() if len(rows) > 1 else rewards.new_zeros(())
                share = utility / ((deviation if deviation > 1e-3 else 1.0) + eps)
            elif credit == "sum_mean":
                share = torch.where(total.abs() > 1e-6, utility * distance / total, utility / len(prompts))
            advantages[rows[:count]] = share
    return advantages, papers
