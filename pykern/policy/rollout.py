"""Correction for a sampler whose probabilities differ from the trainer's: weights and rejection, rows of a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

from .. import _native
from .checks import check_floats, check_like, checked_flags, checked_numbers, checked_offsets, constant, lookup

WEIGHTS = ("token", "sequence", "geometric")
"""The ratio that a weight is: of the token, of the sequence (a product), or the geometric mean over the sequence."""

CRITERIA = (
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
)
"""What tokens are rejected by. With d = old_logprob - rollout_logprob: k1 = -d; k2 = d^2 / 2; k3 = exp(d) - d - 1; of
the token, or the sum, mean or largest over its sequence, which stays or goes as a whole."""

METRICS = (
    "weight_mean",
    "weight_std",
    "weight_max",
    "weight_min",
    "weight_fraction_high",
    "weight_fraction_low",
    "effective_sample_size",
    "normalization",
    "rejected_fraction",
    "rejected_sequence_fraction",
    "vetoed_fraction",
    "kl",
    "k3_kl",
    "training_ppl",
    "training_log_ppl",
    "rollout_ppl",
    "rollout_log_ppl",
    "log_ppl_diff",
    "log_ppl_abs_diff",
    "log_ppl_diff_max",
    "log_ppl_diff_min",
    "ppl_ratio",
    "chi2_token",
    "chi2_seq",
)


@dataclass(frozen=True)
class RolloutCorrection:
    """A row of ROLLOUT_CORRECTIONS: the defaults of rollout_correction's keywords of the same names.

    weight_clip: the bounds of a weight. weight_rule: "truncate" takes the bound beyond it, "mask" zero.
    reject, reject_bounds: criteria, and for each the bounds within which a token or sequence stays: of exp(k1) for k1,
    of the divergence for k2 and k3.
    veto: a sequence goes where one of its tokens has a ratio below it.
    limit: of log-ratios, of the token and where summed, either way, before they are exponentiated or compared.
    unscored: "nan", or "one" for a ratio of one where the sampler reports NaN.
    """

    weight: str | None = "token"
    weight_clip: tuple[float, float] = (0.0, 2.0)
    weight_rule: str = "truncate"
    reject: tuple[str, ...] = ()
    reject_bounds: tuple[tuple[float, float], ...] = ()
    veto: float | None = None
    normalize: bool = False
    limit: float = math.inf
    unscored: str = "nan"
    source: str = ""


def _verl(weight=None, clip=(0.0, 2.0), rule="truncate", reject=(), bounds=()):
    return RolloutCorrection(weight, clip, rule, reject, bounds, limit=20.0, source="verl RolloutCorrectionConfig")


def _trl(weight, rule):
    return RolloutCorrection(
        weight, (0.0, 3.0), rule, unscored="one", source="TRL GRPOConfig.vllm_importance_sampling_mode"
    )


_RATIO = ((0.5, 2.0),)
_GEOMETRIC = ((0.999, 1.001),)
_K3 = ((-math.inf, 0.01),)
_NO_BOUND = (0.0, math.inf)

ROLLOUT_CORRECTIONS: dict[str, RolloutCorrection] = {
    "tis": RolloutCorrection(source="fengyao.notion.site/off-policy-rl: truncated importance sampling"),
    "icepop": RolloutCorrection("token", (0.5, 5.0), "mask", source="arXiv 2510.18855"),
    "mis": RolloutCorrection(
        "sequence", (0.0, 2.0), "mask", source="yingru.notion.site, When Speed Kills Stability: masked sequences"
    ),
    "verl_token_is": _verl("token"),
    "verl_seq_is": _verl("sequence"),
    "verl_token_icepop": _verl("token", (0.5, 5.0), "mask"),
    "verl_seq_is_rs": _verl("sequence", reject=("seq_sum_k1",), bounds=_RATIO),
    "verl_geo_rs": _verl(reject=("seq_mean_k1",), bounds=_GEOMETRIC),
    "verl_geo_rs_seq_tis": _verl("sequence", reject=("seq_mean_k1",), bounds=_GEOMETRIC),
    "verl_geo_rs_token_tis": _verl("token", reject=("seq_mean_k1",), bounds=_GEOMETRIC),
    "verl_k3_rs": _verl(reject=("seq_mean_k3",), bounds=_K3),
    "verl_k3_rs_seq_tis": _verl("sequence", reject=("seq_mean_k3",), bounds=_K3),
    "verl_k3_rs_token_tis": _verl("token", reject=("seq_mean_k3",), bounds=_K3),
    "trl_token_truncate": _trl("token", "truncate"),
    "trl_token_mask": _trl("token", "mask"),
    "trl_sequence_truncate": _trl("sequence", "truncate"),
    "trl_sequence_mask": _trl("sequence", "mask"),
    "openrlhf_tis": RolloutCorrection("token", (0.5, 5.0), source="OpenRLHF PolicyLoss: token, clip"),
    "openrlhf_icepop": RolloutCorrection("token", (0.5, 5.0), "mask", source="OpenRLHF PolicyLoss: token, mask"),
    # Their bounds are of old over rollout, and those of exp(k1) of rollout over old.
    "openrlhf_seq_mask_tis": RolloutCorrection(
        "token", _NO_BOUND, reject=("seq_mean_k1",), reject_bounds=((1 / 5.0, 1 / 0.5),),
        source="OpenRLHF PolicyLoss: seq, mask",
    ),
    "nemo_seq_mask_tis": RolloutCorrection(
        "token", _NO_BOUND, reject=("seq_mean_k1",), reject_bounds=((1 / 1.002, 1 / 0.999),),
        source="NeMo-RL prorlv2_1_moe: seq-mask-tis",
    ),
    "slime_mis": RolloutCorrection(
        "token", (0.0, 2.0), reject=("token_k1",), reject_bounds=_RATIO, veto=1e-4, normalize=True, limit=20.0,
        source="slime train_infer_mismatch_helper/mis.yaml",
    ),
}  # fmt: skip


def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    correction: str = "tis",
    weight: str | None | EllipsisType = ...,
    weight_clip: tuple[float, float] | EllipsisType = ...,
    weight_rule: str | EllipsisType = ...,
    reject: str | Sequence[str] | EllipsisType = ...,
    reject_bounds: float | Sequence[float | tuple[float, float]] | EllipsisType = ...,
    veto: float | None | EllipsisType = ...,
    normalize: bool | EllipsisType = ...,
    limit: float | EllipsisType = ...,
    unscored: str | EllipsisType = ...,
) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
    """Weights and a rejection mask against the sampler's probabilities, and metrics, in one pass over the tokens.

    With d_t = old_logprob - rollout_logprob, kept within +-limit, and L a sequence's unmasked tokens, a weight is

    - "token": exp(d_t); "sequence": exp(sum_t d_t); "geometric": exp(sum_t d_t / L), a sum being of d_t as it is and
      then kept within +-limit;
    - by rule "truncate" at least low and at most high, by "mask" 0 outside [low, high];
    - with `normalize` divided by the mean weight: over the unmasked tokens for "token", else over the sequences.

    A token stays where every criterion of `reject` holds for it or its sequence, low <= statistic <= high, and no token
    of its sequence has exp(d_t) below `veto`. A NaN fails every criterion, and shows in a truncated weight.

    For policy_loss(rollout_weights=weights, keep=keep), which counts rejected tokens in its denominators, as TRL and
    OpenRLHF do; verl and slime leave them out, which is policy_loss(mask=keep, rollout_weights=weights).

    Weights with rejection: arXiv 2510.18855 (IcePop), and the sources in ROLLOUT_CORRECTIONS. A row named after a peer
    gives that peer's numbers: verl's compute_rollout_correction_and_rejection_mask with the RolloutCorrectionConfig of
    that name (its bypass rows are the same with the trained policy's log-probabilities as old_logprobs), TRL's
    vllm_importance_sampling_ratio, OpenRLHF's PolicyLoss, NeMo-RL's seq-mask-tis, slime's compute_mis_weights.

    Args:
        old_logprobs: of the taken tokens under the trainer's policy, [B, T], or packed [N] with cu_seqlens.
        rollout_logprobs: of the shape of old_logprobs, as the sampler reported them.
        mask: of the shape of old_logprobs; a token counts where it is not 0. None: all tokens.
        cu_seqlens: [B + 1] integers from 0 to N, the packed sequences' bounds; on a GPU not checked.
        correction: a row of ROLLOUT_CORRECTIONS, which holds what is not given here.
        weight: one of WEIGHTS, or None for none.
        weight_clip, weight_rule: bounds of the weight, and what is done about them.
        reject: criteria, in a sequence or in a string between commas.
        reject_bounds: one for all criteria, or one each: (low, high), or a number for (1 / number, number) of exp(k1),
            (-inf, number) of k2 and k3.
        veto, normalize, limit, unscored: see RolloutCorrection.

    Returns:
        weights: of the shape of old_logprobs, 0 where masked, or [B] for "sequence" and "geometric"; None for none.
        keep: bool, of the shape of old_logprobs: unmasked and not rejected.
        metrics: scalars. Of the weights before they are normalised, over the unmasked tokens: "weight_mean", "_std",
            "_max", "_min", "effective_sample_size" (mean squared over mean square); of the weights before their
            bounds, over tokens or sequences: "weight_fraction_high", and "_low" (below low, or below 1 / high if low
            is 0); "normalization", the divisor. "rejected_fraction" of tokens, "rejected_sequence_fraction" of
            sequences that lose a token, "vetoed_fraction", and for each criterion c "rejected_c" and
            "rejected_c_sequences". Over tokens "kl" (mean of -d), "k3_kl", "chi2_token"; over sequences with tokens
            verl's "training_ppl", "rollout_ppl", their logarithms "..._log_ppl", "log_ppl_diff", "_abs_diff", "_max",
            "_min", "ppl_ratio", "chi2_seq".

    Raises:
        TypeError, ValueError: naming the argument.
    """
    row = lookup(ROLLOUT_CORRECTIONS, correction, "correction")
    weight = row.weight if weight is ... else weight
    weight_clip = row.weight_clip if weight_clip is ... else weight_clip
    weight_rule = row.weight_rule if weight_rule is ... else weight_rule
    veto = row.veto if veto is ... else veto
    normalize = row.normalize if normalize is ... else normalize
    limit = row.limit if limit is ... else limit
    unscored = row.unscored if unscored is ... else unscored
    if weight is not None and weight not in WEIGHTS:
        raise ValueError(f"weight: expected None or one of {', '.join(WEIGHTS)}, got {weight!r}")
    low, high = checked_numbers(weight_clip, "weight_clip", "low", "high")
    if not 0 <= low <= high or not high > 0:
        raise ValueError(f"weight_clip: expected 0 <= low <= high and a positive high, got {weight_clip!r}")
    if weight_rule not in ("truncate", "mask"):
        raise ValueError(f'weight_rule: expected "truncate" or "mask", got {weight_rule!r}')
    if veto is not None and not veto > 0:
        raise ValueError(f"veto: expected None or a positive ratio, got {veto!r}")
    if not limit > 0:
        raise ValueError(f"limit: expected a positive log-ratio, got {limit!r}")
    if unscored not in ("nan", "one"):
        raise ValueError(f'unscored: expected "nan" or "one", got {unscored!r}')
    criteria = row.reject if reject is ... else _names(reject)
    if reject_bounds is ...:
        bounds = row.reject_bounds
        if reject is not ... and criteria and criteria != row.reject:
            raise ValueError(f"reject_bounds: reject={reject!r} needs them")
    else:
        bounds = _bounds(reject_bounds, criteria)
    log_bounds = {
        criterion: tuple(_log(bound) for bound in pair) if criterion.endswith("k1") else pair
        for criterion, pair in zip(criteria, bounds)
    }
    weights, keep, metrics = corrected(
        old_logprobs, rollout_logprobs, mask, cu_seqlens, weight, (low, high), weight_rule, log_bounds, veto, normalize,
        limit, unscored,
    )  # fmt: skip
    values = metrics.unbind()
    named = dict(zip(METRICS, values))
    for criterion in criteria:
        place = len(METRICS) + 2 * CRITERIA.index(criterion)
        named[f"rejected_{criterion}"] = values[place]
        named[f"rejected_{criterion}_sequences"] = values[place + 1]
    return None if weight is None else weights, keep, named


def corrected(
    old_logprobs, rollout_logprobs, mask, cu_seqlens, weight, weight_clip, weight_rule, log_bounds, veto, normalize,
    limit, unscored, name="old_logprobs",
):  # fmt: skip
    """The op, behind the checks of its tensors. `log_bounds` are of k1 itself; `name` is of the first argument."""
    check_floats(old_logprobs, name)
    check_floats(rollout_logprobs, "rollout_logprobs")
    cu_seqlens, _ = checked_offsets(cu_seqlens, old_logprobs, name)
    check_like(rollout_logprobs, "rollout_logprobs", old_logprobs, name)
    flags = checked_flags(mask, "mask", old_logprobs, name)
    _native.require_kernels(old_logprobs, name, "rollout_correction")
    settings = [*weight_clip, float(limit), 0.0 if veto is None else float(veto)]
    for criterion in CRITERIA:
        settings += log_bounds.get(criterion, (-math.inf, math.inf))
    old = constant(old_logprobs)
    return torch.ops.pykern.rollout_correction.default(
        old,
        rollout_logprobs.detach().to(old.dtype).contiguous(),
        flags,
        cu_seqlens,
        0 if weight is None else 1 + WEIGHTS.index(weight),
        weight_rule == "mask",
        sum(1 << CRITERIA.index(criterion) for criterion in log_bounds),
        unscored == "one",
        normalize,
        settings,
    )


@torch.library.register_fake("pykern::rollout_correction")
def _rollout_correction_fake(
    old_logprobs, rollout_logprobs, mask, cu_seqlens, weight, weight_mask, criteria, unscored_are_one, normalize,
    settings,
):  # fmt: skip
    sequences = old_logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weights = torch.empty_like(old_logprobs) if weight == 1 else old_logprobs.new_empty(sequences if weight else 0)
    keep = torch.empty_like(old_logprobs, dtype=torch.bool)
    return weights, keep, old_logprobs.new_empty(len(METRICS) + 2 * len(CRITERIA))


def _names(reject: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in reject.split(",")) if isinstance(reject, str) else tuple(reject)
    for name in names:
        if name not in CRITERIA:
            raise ValueError(f"reject: expected criteria of {', '.join(CRITERIA)}, got {name!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"reject: expected each criterion once, got {', '.join(names)}")
    return names


def _bounds(given, criteria: tuple[str, ...]) -> tuple[tuple[float, float], ...]:
    each = [given] * len(criteria) if isinstance(given, (int, float)) else list(given)
    if len(each) != len(criteria):
        raise ValueError(f"reject_bounds: expected one for each of {len(criteria)} criteria, got {len(each)}")
    pairs = []
    for criterion, bound in zip(criteria, each):
        of_ratio = criterion.endswith("k1")
        if isinstance(bound, (int, float)):
            if not bound > 0:
                raise ValueError(f"reject_bounds: expected a positive bound of {criterion}, got {bound!r}")
            bound = (1 / bound if of_ratio else -math.inf, bound)
        low, high = bound
        if not low <= high or (of_ratio and not 0 <= low):
            raise ValueError(f"reject_bounds: expected low <= high of {criterion}, got {bound!r}")
        pairs.append((float(low), float(high)))
    return tuple(pairs)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf
