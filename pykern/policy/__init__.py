"""Group-normalised policy optimisation: advantages, policy losses, token log-probabilities."""

from .advantages import BASELINES, ESTIMATORS, SCALES, group_advantages
from .logprobs import linear_token_logprobs, token_logprobs
from .loss import AGGREGATES, KL_ESTIMATORS, LOSSES, policy_loss
from .order_statistics import masked_moments, masked_quantile, share_mask

__all__ = [
    "AGGREGATES",
    "BASELINES",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "LOSSES",
    "SCALES",
    "group_advantages",
    "linear_token_logprobs",
    "masked_moments",
    "masked_quantile",
    "policy_loss",
    "share_mask",
    "token_logprobs",
]
