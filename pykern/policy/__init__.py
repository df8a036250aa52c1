"""Group-normalised policy optimisation: advantages, policy losses, token log-probabilities."""

from .advantages import group_advantages
from .estimators import BASELINES, ESTIMATORS, FILTERS, FINISHES, SCALES, TRANSFORMS
from .linear import linear_token_logprobs
from .logprobs import token_logprobs
from .loss import policy_loss, policy_loss_token_weights
from .losses import AGGREGATES, KL_ESTIMATORS, KL_GRADIENTS, LOSSES

__all__ = [
    "AGGREGATES",
    "BASELINES",
    "ESTIMATORS",
    "FILTERS",
    "FINISHES",
    "KL_ESTIMATORS",
    "KL_GRADIENTS",
    "LOSSES",
    "SCALES",
    "TRANSFORMS",
    "group_advantages",
    "linear_token_logprobs",
    "policy_loss",
    "policy_loss_token_weights",
    "token_logprobs",
]
