"""Group-normalised policy optimisation: advantages, policy losses, token log-probabilities."""

from .advantages import BASELINES, ESTIMATORS, SCALES, group_advantages
from .disco import DISCO_LOSSES, disco_loss
from .logprobs import linear_token_logprobs, token_logprobs
from .loss import AGGREGATES, KL_ESTIMATORS, LOSSES, policy_loss
from .order_statistics import masked_moments, masked_quantile, share_mask
from .rollout import ROLLOUT_CORRECTIONS, RolloutCorrection, rollout_correction
from .selection import clip_cov_mask, hapo_modulation, kl_cov_mask, low_probability_mask, opsm_mask, top_entropy_mask

__all__ = [
    "AGGREGATES",
    "BASELINES",
    "DISCO_LOSSES",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "LOSSES",
    "ROLLOUT_CORRECTIONS",
    "RolloutCorrection",
    "SCALES",
    "clip_cov_mask",
    "disco_loss",
    "group_advantages",
    "hapo_modulation",
    "kl_cov_mask",
    "linear_token_logprobs",
    "low_probability_mask",
    "masked_moments",
    "masked_quantile",
    "opsm_mask",
    "policy_loss",
    "rollout_correction",
    "share_mask",
    "token_logprobs",
    "top_entropy_mask",
]
