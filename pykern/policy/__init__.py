"""Group-normalised policy optimisation: advantages, policy losses, token log-probabilities."""

from .advantages import BASELINES, ESTIMATORS, SCALES, group_advantages
from .logprobs import linear_token_logprobs, token_logprobs
from .loss import AGGREGATES, KL_ESTIMATORS, LOSSES, policy_loss
from .returns import CARRIES, discounted_returns, gae, length_adaptive_lambda, masked_whiten
from .risk import CREDITS, TRACKINGS, QuantileTracker, risk_advantages
from .token_baseline import ALIGNMENTS, optimal_token_baseline

__all__ = [
    "AGGREGATES",
    "ALIGNMENTS",
    "BASELINES",
    "CARRIES",
    "CREDITS",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "LOSSES",
    "SCALES",
    "TRACKINGS",
    "QuantileTracker",
    "discounted_returns",
    "gae",
    "group_advantages",
    "length_adaptive_lambda",
    "linear_token_logprobs",
    "masked_whiten",
    "optimal_token_baseline",
    "policy_loss",
    "risk_advantages",
    "token_logprobs",
]
