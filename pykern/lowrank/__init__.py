"""Low-rank optimizers: moments that live in a subspace of the gradient."""

from .backward import BackwardStepper, step_in_backward
from .groups import low_rank_groups
from .int8_linear import Int8Linear, int8_linears
from .optimizer import LowRankAdamW, LowRankOptimizer
from .presets import FiraAdamW, GaLoreAdamW

__all__ = [
    "BackwardStepper",
    "FiraAdamW",
    "GaLoreAdamW",
    "Int8Linear",
    "LowRankAdamW",
    "LowRankOptimizer",
    "int8_linears",
    "low_rank_groups",
    "step_in_backward",
]
