"""Shared-prefix attention: exact attention over any prefix tree, each shared prefix stored once."""

from .microbatch import MicrobatchPlan, fill_microbatches, plan_microbatches
from .pack import PackedBatch, pack
from .prefix_attention import prefix_attention
from .rows import gather_rows
from .sequences import PackedSequences, join_turns, pack_sequences
from .tree import PrefixTree

__all__ = [
    "MicrobatchPlan",
    "PackedBatch",
    "PackedSequences",
    "PrefixTree",
    "fill_microbatches",
    "gather_rows",
    "join_turns",
    "pack",
    "pack_sequences",
    "plan_microbatches",
    "prefix_attention",
]
