"""Low-rank optimizers: moments that live in a subspace of the gradient."""

from .backward import BackwardStepper, step_in_backward
from .groups import low_rank_groups
from .optimizer import LowRankAdamW, LowRankOptimizer
from .presets import FiraAdamW, GaLoreAdamW
from .refactorize import refactorize, reset_moments
from .sltrain import SLTrainLinear, sltrain_linear
from .weight_norm import NormalizedLowRankLinear

__all__ = [
    "BackwardStepper",
    "FiraAdamW",
    "GaLoreAdamW",
    "LowRankAdamW",
    "LowRankOptimizer",
    "NormalizedLowRankLinear",
    "SLTrainLinear",
    "low_rank_groups",
    "refactorize",
    "reset_moments",
    "sltrain_linear",
    "step_in_backward",
]
