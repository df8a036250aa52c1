"""Low-rank optimizers: AdamW whose moments live in a subspace of the gradient."""

from .backward import BackwardStepper, step_in_backward
from .groups import low_rank_groups
from .optimizer import FiraAdamW, GaLoreAdamW, LowRankAdamW

__all__ = ["BackwardStepper", "FiraAdamW", "GaLoreAdamW", "LowRankAdamW", "low_rank_groups", "step_in_backward"]
