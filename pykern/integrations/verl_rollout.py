"""verl's rollout correction; pykern.integrations.verl hands it on."""

from typing import Any

import torch
from torch import Tensor
from verl import DataProto

from ..policy import rollout_correction

_WEIGHT_METRICS = {
    "rollout_is_mean": "weight_mean",
    "rollout_is_std": "weight_std",
    "rollout_is_max": "weight_max",
    "rollout_is_min": "weight_min",
    "rollout_is_eff_sample_size": "effective_sample_size",
    "rollout_is_ratio_fraction_high": "weight_fraction_high",
    "rollout_is_ratio_fraction_low": "weight_fraction_low",
}
_REJECTION_METRICS = {
    "rollout_rs_masked_fraction": "rejected_fraction",
    "rollout_rs_seq_masked_fraction": "rejected_sequence_fraction",
}
_POLICY_METRICS = (
    "kl", "k3_kl", "training_ppl", "training_log_ppl", "rollout_ppl", "rollout_log_ppl", "log_ppl_diff",
    "log_ppl_abs_diff", "log_ppl_diff_max", "log_ppl_diff_min", "ppl_ratio", "chi2_token", "chi2_seq",
)  # fmt: skip


def _bounds(given: str | float, name: str) -> list[tuple[float | None, float]]:
    """verl's thresholds, "upper" or "lower_upper" between commas, as pairs."""
    if isinstance(given, bool):
        raise TypeError(f"{name}: expected a number or a string such as 0.5_2.0, not a boolean, got {given}")
    pairs = []
    for part in str(given).split(","):
        try:
            *low, high = (float(number) for number in part.strip().split("_"))
        except ValueError:
            raise ValueError(f"{name}: expected numbers, as in 2.0 or 0.5_2.0, got {given!r}") from None
        if len(low) > 1 or not high > 0 or (low and not 0 < low[0] <= high):
            raise ValueError(f"{name}: expected positive bounds, the lower one first, got {given!r}")
        pairs.append((low[0] if low else None, high))
    return pairs


def _criterion_mean(name: str, distance: Tensor, mask: Tensor) -> Tensor:
    """The mean over the unmasked tokens of what a criterion compares; verl logs it."""
    *level, kind = name.split("_")
    distance = torch.where(mask, distance, 0.0).clamp(-20.0, 20.0)
    values = {"k1": -distance, "k2": 0.5 * distance.square(), "k3": torch.expm1(distance) - distance}[kind]
    counts = mask.sum(dim=-1)
    if level == ["token"]:
        return values.sum() / counts.sum().clamp(min=1)
    if level == ["seq", "max"]:
        statistic = torch.where(mask, values, -torch.inf).amax(dim=-1)
    else:
        statistic = values.sum(dim=-1) / (counts.clamp(min=1) if level == ["seq", "mean"] else 1)
    return torch.where(counts > 0, statistic * counts, 0.0).sum() / counts.sum().clamp(min=1)


def compute_rollout_correction_and_rejection_mask(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    response_mask: Tensor,
    rollout_is: str | None = None,
    rollout_is_threshold: str | float | None = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str | None = None,
    rollout_rs_threshold: str | float | None = None,
) -> tuple[DataProto | None, Tensor, dict[str, float]]:
    """verl's function of this name in one pass: weights (a DataProto), the mask without what is rejected, metrics.

    Of verl's metrics the statistics of each sequence's mean weight ("rollout_is_seq_...") are not among these, nor
    the extremes and deviations of what a criterion compares.
    """
    keywords: dict[str, Any] = {"weight": None, "reject": (), "reject_bounds": ()}
    if rollout_is is not None and rollout_is_threshold is not None:
        ((low, high),) = _bounds(rollout_is_threshold, "rollout_is_threshold")
        rule = "truncate" if low is None else "mask"
        keywords |= {"weight": rollout_is, "weight_rule": rule, "weight_clip": (low or 0.0, high)}
    if rollout_rs is not None:
        if rollout_rs_threshold is None:
            raise ValueError(f"rollout_rs_threshold: rollout_rs={rollout_rs!r} needs it, got None")
        criteria = [name.strip() for name in rollout_rs.split(",")]
        pairs = _bounds(rollout_rs_threshold, "rollout_rs_threshold")
        if len(pairs) not in (1, len(criteria)):
            raise ValueError(f"rollout_rs_threshold: expected 1 or {len(criteria)} thresholds, got {len(pairs)}")
        pairs = pairs * len(criteria) if len(pairs) == 1 else pairs
        keywords["reject"] = criteria
        keywords["reject_bounds"] = [high if low is None else (low, high) for low, high in pairs]
    weights, keep, measured = rollout_correction(
        old_log_prob,
        rollout_log_prob,
        mask=response_mask,
        correction="verl_token_is",
        normalize=rollout_is_batch_normalize,
        **keywords,
    )
    names = {name: name for name in _POLICY_METRICS}
    if weights is not None:
        names |= _WEIGHT_METRICS
        if rollout_is_batch_normalize:
            names["rollout_is_batch_norm_factor"] = "normalization"
    if rollout_rs is not None:
        names |= _REJECTION_METRICS
        for name in keywords["reject"]:
            names[f"rollout_rs_{name}_masked_fraction"] = f"rejected_{name}"
            names[f"rollout_rs_{name}_seq_masked_fraction"] = f"rejected_{name}_sequences"
    values = torch.stack([measured[name] for name in names.values()]).tolist()
    metrics = {f"rollout_corr/{name}": value for name, value in zip(names, values)}
    for name in keywords["reject"]:
        mean = _criterion_mean(name, old_log_prob - rollout_log_prob, response_mask != 0)
        metrics[f"rollout_corr/rollout_rs_{name}_mean"] = mean.item()
    if weights is not None and keywords["weight_rule"] == "mask":
        sides = ("rollout_corr/rollout_is_ratio_fraction_high", "rollout_corr/rollout_is_ratio_fraction_low")
        metrics["rollout_corr/rollout_is_oob_ratio"] = sum(metrics[side] for side in sides)
    mask = torch.where(keep, response_mask, torch.zeros_like(response_mask))
    if weights is None:
        return None, mask, metrics
    if weights.dim() == 1:
        weights = torch.where(response_mask != 0, weights[:, None], 0.0)
    return DataProto.from_dict(tensors={"rollout_is_weights": weights}), mask, metrics
