"""Low-rank optimizers: moments that live in a subspace of the gradient."""

from .backward import BackwardOptimizer, BackwardStepper, step_in_backward
from .groups import low_rank_groups
from .int8_linear import Int8Linear, int8_linears
from .optimizer import LowRankAdamW, LowRankOptimizer
from .presets import (
    ApolloAdamW,
    ApolloMini,
    DCTAdamW,
    FiraAdamW,
    Flora,
    Frugal,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRPAdamW,
    GrassAdamW,
    LDAdamW,
    QGaLoreAdamW8bit,
    Trion,
)
from .refactorize import refactorize, reset_moments
from .sltrain import SLTrainLinear, sltrain_linear
from .weight_norm import NormalizedLowRankLinear

__all__ = [
    "ApolloAdamW",
    "ApolloMini",
    "BackwardOptimizer",
    "BackwardStepper",
    "DCTAdamW",
    "FiraAdamW",
    "Flora",
    "Frugal",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GradNormLoRPAdamW",
    "GrassAdamW",
    "Int8Linear",
    "LDAdamW",
    "LowRankAdamW",
    "LowRankOptimizer",
    "NormalizedLowRankLinear",
    "QGaLoreAdamW8bit",
    "SLTrainLinear",
    "Trion",
    "int8_linears",
    "low_rank_groups",
    "refactorize",
    "reset_moments",
    "sltrain_linear",
    "step_in_backward",
]
