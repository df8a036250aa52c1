"""Group-normalised policy optimisation: advantages, policy losses, token log-probabilities."""

from .advantages import BASELINES, ESTIMATORS, SCALES, group_advantages
from .linear import linear_token_logprobs
from .linear_loss import linear_policy_loss
from .logprobs import token_logprobs
from .loss import policy_loss, policy_loss_token_weights
from .loss_weights import annealed_coef, copo_weights
from .losses import AGGREGATES, KL_ESTIMATORS, KL_GRADIENTS, LOSSES

__all__ = [
    "AGGREGATES",
    "BASELINES",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "KL_GRADIENTS",
    "LOSSES",
    "SCALES",
    "annealed_coef",
    "copo_weights",
    "group_advantages",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "policy_loss_token_weights",
    "token_logprobs",
]
