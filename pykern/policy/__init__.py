"""Group-normalised policy optimisation: advantages and policy losses."""

from .advantages import BASELINES, ESTIMATORS, SCALES, group_advantages
from .loss import AGGREGATES, KL_ESTIMATORS, LOSSES, policy_loss

__all__ = [
    "AGGREGATES",
    "BASELINES",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "LOSSES",
    "SCALES",
    "group_advantages",
    "policy_loss",
]
