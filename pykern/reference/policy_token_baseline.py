"""What optimal_token_baseline means, in plain PyTorch. Slow: one group at a time."""

import torch
from torch import Tensor


def optimal_token_baseline(
    returns: Tensor,
    logprobs: Tensor,
    sum_p2: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    align: str = "position",
    zero_tail: bool = True,
    eps: float = 1e-8,
    singleton: str = "zero",
) -> Tensor:
    """Advantages [B, T]; see pykern.optimal_token_baseline."""
    mask = torch.ones_like(returns, dtype=torch.bool) if mask is None else mask.bool()
    weights = torch.ones_like(returns) if importance_weights is None else importance_weights
    energy = torch.where(mask, (1 - 2 * logprobs.exp() + sum_p2) * weights.square(), 0.0).cumsum(1)
    values = torch.where(mask, returns, 0.0)
    takes_part = energy.isfinite().all(1) & values.isfinite().all(1) & mask.any(1)
    advantages = torch.zeros_like(returns)
    for group in group_ids.unique():
        rows = ((group_ids == group) & takes_part).nonzero().flatten().tolist()
        if not rows:
            continue
        if len(rows) == 1:
            if singleton == "self":
                advantages[rows[0]] = values[rows[0]]
            continue
        columns = {row: mask[row].nonzero().flatten() for row in rows}
        steps = {row: of_row if align == "position" else torch.arange(len(of_row)) for row, of_row in columns.items()}
        wide = returns.shape[1]
        value, weight, here = (torch.zeros(len(rows), wide, dtype=returns.dtype) for _ in range(3))
        for i, row in enumerate(rows):
            value[i, steps[row]] = values[row, columns[row]]
            weight[i, steps[row]] = energy[row, columns[row]]
            here[i, steps[row]] = 1
        baseline = (value * weight).sum(0) / (weight.sum(0) + eps)
        high = torch.where(here > 0, value, float("-inf")).amax(0)
        low = torch.where(here > 0, value, float("inf")).amin(0)
        distance = torch.where(low < high, value - baseline, 0.0)
        lengths = here.sum(1).long()
        ordered = lengths.sort(descending=True)
        if zero_tail and ordered.values[0] > ordered.values[1]:
            longest, second = ordered.indices[0], int(ordered.values[1])
            distance[longest, second:] = value[longest, second:]
        for i, row in enumerate(rows):
            advantages[row, columns[row]] = distance[i, steps[row]]
    return advantages
