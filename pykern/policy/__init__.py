"""Group-normalised policy optimisation: advantages, policy losses, token log-probabilities."""

from .advantages import group_advantages, group_entropy
from .estimators import BASELINES, ESTIMATORS, FILTERS, FINISHES, SCALES, TRANSFORMS
from .logprobs import linear_token_logprobs, token_logprobs
from .loss import AGGREGATES, KL_ESTIMATORS, LOSSES, policy_loss

__all__ = [
    "AGGREGATES",
    "BASELINES",
    "ESTIMATORS",
    "FILTERS",
    "FINISHES",
    "KL_ESTIMATORS",
    "LOSSES",
    "SCALES",
    "TRANSFORMS",
    "group_advantages",
    "group_entropy",
    "linear_token_logprobs",
    "policy_loss",
    "token_logprobs",
]
