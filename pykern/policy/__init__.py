"""Group-normalised policy optimisation: advantages, policy losses, token log-probabilities."""

from .advantages import BASELINES, ESTIMATORS, SCALES, group_advantages
from .logprobs import linear_token_logprobs, token_logprobs
from .loss import policy_loss, policy_loss_token_weights
from .losses import AGGREGATES, KL_ESTIMATORS, KL_GRADIENTS, LOSSES

__all__ = [
    "AGGREGATES",
    "BASELINES",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "KL_GRADIENTS",
    "LOSSES",
    "SCALES",
    "group_advantages",
    "linear_token_logprobs",
    "policy_loss",
    "policy_loss_token_weights",
    "token_logprobs",
]
