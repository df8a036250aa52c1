"""Which tiles of keys a tile of queries sees: none of it, some, or all."""

import torch
from torch import Tensor

from .. import _native

_bounds = torch.ops.pykern.prefix_attention_tiles.default

SKIP, PARTIAL, FULL = 0, 1, 2
"""Classes of a tile pair: no query sees a key; some may; every query sees every key."""


@torch.library.register_fake("pykern::prefix_attention_tiles")
def _(subtree_end, tile):
    return subtree_end.new_empty((subtree_end.shape[0] + tile - 1) // tile, 2)


def tile_bounds(subtree_end: Tensor, tile_size: int) -> Tensor:
    """int32 [ceil(T / tile_size), 2]: the smallest and the largest `subtree_end` of each tile of keys.

    subtree_end: int32 [T] on the CPU or a GPU. A key that no query sees (padding, `subtree_end[j] <= j`) counts as 0,
    so it takes "full" from its tile but never keeps it from being skipped. One small launch; every layer, the forward
    and the backward use the same bounds. `classify_tile_pair` says what they tell.
    """
    if not isinstance(subtree_end, Tensor) or subtree_end.dtype != torch.int32:
        got = subtree_end.dtype if isinstance(subtree_end, Tensor) else type(subtree_end).__name__
        raise TypeError(f"subtree_end: expected an int32 tensor, got {got}")
    if subtree_end.dim() != 1:
        raise ValueError(f"subtree_end: expected one dimension, got shape {tuple(subtree_end.shape)}")
    if isinstance(tile_size, bool) or not isinstance(tile_size, int):
        raise TypeError(f"tile_size: expected an integer, got {type(tile_size).__name__}")
    if tile_size < 1:
        raise ValueError(f"tile_size: expected at least 1, got {tile_size}")
    _native.require_kernels(subtree_end, "subtree_end", "prefix_attention_tiles")
    return _bounds(subtree_end.contiguous(), tile_size)


def classify_tile_pair(
    smallest: Tensor | int,
    largest: Tensor | int,
    first_key: Tensor | int,
    stop_key: Tensor | int,
    first_query: Tensor | int,
    stop_query: Tensor | int,
) -> Tensor | int:
    """SKIP, PARTIAL or FULL for keys [first_key, stop_key) and queries [first_query, stop_query), neither empty.

    smallest, largest: the keys' row of `tile_bounds`. Integers, or tensors that broadcast (the result is then int8).

        FULL: stop_key - 1 <= first_query and smallest >= stop_query     every query sees every key
        SKIP: first_key >= stop_query or largest <= first_query          no query sees a key
        PARTIAL: else                                                    a mask is needed

    FULL is exact. SKIP is exact where stop_key <= stop_query; a tile of keys that reaches beyond the queries may be
    called PARTIAL though they see none of it.
    """
    full = (stop_key - 1 <= first_query) & (smallest >= stop_query)
    skip = (first_key >= stop_query) | (largest <= first_query)
    if not isinstance(full, Tensor) and not isinstance(skip, Tensor):
        return FULL if full else SKIP if skip else PARTIAL
    full, skip = torch.broadcast_tensors(torch.as_tensor(full), torch.as_tensor(skip))
    return (
        torch.full(full.shape, PARTIAL, dtype=torch.int8, device=full.device)
        .masked_fill(full, FULL)
        .masked_fill(skip, SKIP)
    )


__all__ = ["FULL", "PARTIAL", "SKIP", "classify_tile_pair", "tile_bounds"]
