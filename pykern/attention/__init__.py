"""Shared-prefix attention: exact attention over any prefix tree, each shared prefix stored once."""

from .pack import PackedBatch, pack
from .prefix_attention import prefix_attention
from .rows import gather_rows
from .tree import PrefixTree

__all__ = ["PackedBatch", "PrefixTree", "gather_rows", "pack", "prefix_attention"]
