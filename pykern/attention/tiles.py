"""What kernels need to know of a tree to skip what no query sees: bounds of its tiles, and the longest first."""

import torch
from torch import Tensor

from .. import _native

TILE_TOKENS = 64
"""Tokens of a tile, as queries and as keys."""

BLOCK_TOKENS = 128
"""Tokens of a block, which is scheduled as one."""

_tiles = torch.ops.pykern.prefix_attention_tiles.default


@torch.library.register_fake("pykern::prefix_attention_tiles")
def _(subtree_end, position):
    tokens = subtree_end.shape[0]
    tiles, blocks = (tokens + TILE_TOKENS - 1) // TILE_TOKENS, (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    return subtree_end.new_empty(tiles, 4), subtree_end.new_empty(2, blocks)


def tree_tiles(subtree_end: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """(bounds, order) of a tree's tensors, int32 [T] on the CPU or a GPU; two small kernels, no synchronisation.

    bounds: int32 [ceil(T / 64), 4]; of each tile of 64 tokens the smallest and the largest `subtree_end`, then the
        smallest and the largest `position`. A key that no query sees (padding, `subtree_end[j] <= j`) counts as end 0.
    order: int32 [2, ceil(T / 128)]; blocks of 128 tokens by falling work, those of equal work in their own order.
        Row 0, as queries: tiles of keys that begin before the block's end and are seen from its first token on.
        Row 1, as keys: tokens from the block's first to its largest `subtree_end`.

    For queries [a, b) and a tile of keys [c, d) with the bounds (least_end, last_end, least_position, last_position):

        skip    c >= b or last_end <= a        or, with a window, least query position - last_position >= window
        full    d - 1 <= a and least_end >= b  and, with a window, last query position - least_position < window
    """
    _native.require_kernels(subtree_end, "subtree_end", "prefix_attention_tiles")
    return _tiles(subtree_end, position)


__all__ = ["BLOCK_TOKENS", "TILE_TOKENS", "tree_tiles"]
