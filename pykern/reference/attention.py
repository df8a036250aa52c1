"""What prefix attention means: a dense mask from subtree_end, a softmax, two products."""

import torch
from torch import Tensor


def visibility(subtree_end: Tensor) -> Tensor:
    """bool [T, T]: entry (i, j) says whether query i sees key j, which is j <= i < subtree_end[j]."""
    rows = torch.arange(subtree_end.shape[0], device=subtree_end.device)
    return (rows[None, :] <= rows[:, None]) & (rows[:, None] < subtree_end[None, :])


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv] -> out [T, Hq, Dv], lse [T, Hq].

    Rows that see nothing give 0 and -inf. Finite inputs only: the dense product multiplies what the mask hides.
    """
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    visible = visibility(subtree_end)
    logits = torch.einsum("ihd,jhd->hij", q, k) * scale
    logits = logits.masked_fill(~visible, float("-inf"))
    empty = ~visible.any(dim=1)
    weights = logits.masked_fill(empty[:, None], 0.0).softmax(dim=-1).masked_fill(empty[:, None], 0.0)
    lse = logits.masked_fill(empty[:, None], 0.0).logsumexp(dim=-1).masked_fill(empty, float("-inf"))
    return torch.einsum("hij,jhd->ihd", weights, v), lse.T


def tile_bounds(subtree_end: Tensor, tile_size: int) -> Tensor:
    """int32 [tiles, 2]: smallest and largest subtree_end of each tile of keys; 0 stands for a key that none sees."""
    rows = torch.arange(subtree_end.shape[0], device=subtree_end.device)
    seen = torch.where(subtree_end > rows, subtree_end, 0)
    bounds = [torch.stack(tile.aminmax()) for tile in seen.split(tile_size) if len(tile)]
    return torch.stack(bounds) if bounds else subtree_end.new_empty(0, 2)


def gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """[S, C], [N] -> [N, C], and by autograd the sum over the uses of each row."""
    return source[rows]
