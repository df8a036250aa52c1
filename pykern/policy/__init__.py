"""Group-normalised policy optimisation: advantages, policy losses, token log-probabilities."""

from .advantages import group_advantages, group_entropy
from .disco import DISCO_LOSSES, disco_loss
from .estimators import BASELINES, ESTIMATORS, FILTERS, FINISHES, SCALES, TRANSFORMS
from .linear import linear_token_logprobs
from .linear_loss import linear_policy_loss
from .logprobs import token_logprobs
from .loss import policy_loss, policy_loss_token_weights
from .loss_weights import annealed_coef, copo_weights
from .losses import AGGREGATES, KL_ESTIMATORS, KL_GRADIENTS, LOSSES
from .order_statistics import masked_moments, masked_quantile, share_mask
from .returns import CARRIES, discounted_returns, gae, length_adaptive_lambda, masked_whiten
from .risk import CREDITS, TRACKINGS, QuantileTracker, risk_advantages
from .rollout import ROLLOUT_CORRECTIONS, RolloutCorrection, rollout_correction
from .selection import (
    aepo_rows,
    clip_cov_mask,
    hapo_modulation,
    kl_cov_mask,
    low_probability_mask,
    opsm_mask,
    top_entropy_mask,
)
from .statistics import group_statistics
from .token_baseline import ALIGNMENTS, optimal_token_baseline

__all__ = [
    "AGGREGATES",
    "ALIGNMENTS",
    "BASELINES",
    "CARRIES",
    "CREDITS",
    "DISCO_LOSSES",
    "ESTIMATORS",
    "FILTERS",
    "FINISHES",
    "KL_ESTIMATORS",
    "KL_GRADIENTS",
    "LOSSES",
    "QuantileTracker",
    "ROLLOUT_CORRECTIONS",
    "RolloutCorrection",
    "SCALES",
    "TRACKINGS",
    "TRANSFORMS",
    "aepo_rows",
    "annealed_coef",
    "clip_cov_mask",
    "copo_weights",
    "disco_loss",
    "discounted_returns",
    "gae",
    "group_advantages",
    "group_entropy",
    "group_statistics",
    "hapo_modulation",
    "kl_cov_mask",
    "length_adaptive_lambda",
    "linear_policy_loss",
    "linear_token_logprobs",
    "low_probability_mask",
    "masked_moments",
    "masked_quantile",
    "masked_whiten",
    "opsm_mask",
    "optimal_token_baseline",
    "policy_loss",
    "policy_loss_token_weights",
    "risk_advantages",
    "rollout_correction",
    "share_mask",
    "token_logprobs",
    "top_entropy_mask",
]
