"""What prefix attention means: a dense mask from subtree_end, a softmax, two products."""

import torch
from torch import Tensor


def visibility(subtree_end: Tensor, position: Tensor | None = None, window: int | None = None) -> Tensor:
    """bool [T, T]: entry (i, j) says whether query i sees key j.

    That is j <= i < subtree_end[j] and, with a window, position[i] - position[j] < window.
    """
    rows = torch.arange(subtree_end.shape[0], device=subtree_end.device)
    visible = (rows[None, :] <= rows[:, None]) & (rows[:, None] < subtree_end[None, :])
    if window is not None:
        visible &= position[:, None] - position[None, :] < window
    return visible


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    position: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv], sinks and alibi_slopes [Hq] -> out [T, Hq, Dv], lse [T, Hq],
    max_logits [Hq]. A window and ALiBi need `position`.

    Rows that see nothing give 0 and -inf. Finite inputs only: the dense product multiplies what the mask hides.
    """
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    visible = visibility(subtree_end, position, window)
    logits = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(q.dtype)[:, None, None] * (position[:, None] - position[None, :])
    logits = logits.masked_fill(~visible, float("-inf"))
    max_logits = logits.detach().flatten(1).amax(dim=1) if len(visible) else logits.new_full((q.shape[1],), -torch.inf)
    empty = ~visible.any(dim=1)
    logits = logits.masked_fill(empty[:, None], 0.0)
    terms = logits
    if sinks is not None:
        terms = torch.cat([logits, sinks.to(q.dtype)[:, None, None].expand(-1, len(visible), 1)], dim=-1)
    weights = terms.softmax(dim=-1)[..., : len(visible)].masked_fill(empty[:, None], 0.0)
    lse = terms.logsumexp(dim=-1).masked_fill(empty, float("-inf"))
    return torch.einsum("hij,jhd->ihd", weights, v), lse.T, max_logits


def tree_tiles(subtree_end: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """bounds int32 [tiles, 4] and order int32 [2, blocks], as `pykern.attention.tiles.tree_tiles` describes them."""
    tokens = subtree_end.shape[0]
    rows = torch.arange(tokens, device=subtree_end.device)
    seen = torch.where(subtree_end > rows, subtree_end, 0)
    tiles = range(0, tokens, 64)
    bounds = subtree_end.new_empty(len(tiles), 4)
    for tile, first in enumerate(tiles):
        ends, positions = seen[first : first + 64], position[first : first + 64]
        bounds[tile] = torch.stack([*ends.aminmax(), *positions.aminmax()])
    blocks = range(0, tokens, 128)
    work = torch.zeros(2, len(blocks), dtype=torch.int64)
    for block, first in enumerate(blocks):
        begins = torch.arange(len(tiles)) * 64
        work[0, block] = ((begins < min(first + 128, tokens)) & (bounds[:, 1].cpu() > first)).sum()
        work[1, block] = max(int(bounds[2 * block : 2 * block + 2, 1].max()) - first, 0)
    order = work.argsort(dim=1, descending=True, stable=True)
    return bounds, order.to(subtree_end)


def gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """[S, C], [N] -> [N, C], and by autograd the sum over the uses of each row."""
    return source[rows]
