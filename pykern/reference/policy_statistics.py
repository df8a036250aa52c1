"""What group_statistics means, in plain PyTorch. Slow: one group at a time."""

import torch
from torch import Tensor


def group_statistics(values: Tensor, group_ids: Tensor, *, ddof: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, count), [N] each; see pykern.group_statistics."""
    mean, std = torch.full_like(values, torch.nan), torch.full_like(values, torch.nan)
    count = torch.zeros_like(group_ids, dtype=torch.int64)
    for group in group_ids.unique():
        rows = group_ids == group
        finite = values[rows & values.isfinite()]
        count[rows] = len(finite)
        if len(finite) == 0:
            continue
        equal = bool((finite == finite[0]).all())
        centre = finite[0] if equal else finite.mean()
        mean[rows] = centre
        std[rows] = 0.0 if equal else ((finite - centre).square().sum() / (len(finite) - ddof)).sqrt()
    return mean, std, count
