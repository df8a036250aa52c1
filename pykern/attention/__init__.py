"""Shared-prefix attention: exact attention over any prefix tree, each shared prefix stored once."""

from .pack import PackedBatch, pack
from .prefix_attention import prefix_attention
from .tree import PrefixTree

__all__ = ["PackedBatch", "PrefixTree", "pack", "prefix_attention"]
