"""Group-normalised policy optimisation: advantages, policy losses, token log-probabilities."""

from .advantages import BASELINES, ESTIMATORS, SCALES, group_advantages
from .linear import linear_token_logprobs
from .logprobs import token_logprobs
from .loss import AGGREGATES, KL_ESTIMATORS, LOSSES, policy_loss

__all__ = [
    "AGGREGATES",
    "BASELINES",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "LOSSES",
    "SCALES",
    "group_advantages",
    "linear_token_logprobs",
    "policy_loss",
    "token_logprobs",
]
