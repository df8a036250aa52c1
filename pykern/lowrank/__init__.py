"""Low-rank optimizers: moments that live in a subspace of the gradient."""

from .backward import BackwardOptimizer, BackwardStepper, step_in_backward
from .groups import low_rank_groups
from .optimizer import LowRankAdamW, LowRankOptimizer
from .presets import FiraAdamW, GaLoreAdamW

__all__ = [
    "BackwardOptimizer",
    "BackwardStepper",
    "FiraAdamW",
    "GaLoreAdamW",
    "LowRankAdamW",
    "LowRankOptimizer",
    "low_rank_groups",
    "step_in_backward",
]
