"""Advantages of grouped samples. An estimator is a baseline and a scale: a row of a table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _native

BASELINES = ("none", "group_mean", "leave_one_out", "length_weighted", "given")
"""What is subtracted from a reward: nothing; the mean of its group; the mean of the others in its group; the mean of
its group weighted by response length; a reward of the caller's for the same prompt."""

SCALES = ("none", "group_std", "batch_std", "token_whiten")
"""What the difference is divided by: nothing; the standard deviation of the group's rewards plus eps; that of all
rewards plus eps; or, after the mean over all tokens is subtracted, the square root of the variance over all tokens plus
eps (every token of a response carries its response's value)."""


@dataclass(frozen=True)
class Estimator:
    """A row of ESTIMATORS. Rewards enter untransformed; all tokens of a response share its advantage."""

    baseline: str
    scale: str
    paper: str


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator("group_mean", "group_std", "arXiv 2402.03300"),
    "dr_grpo": Estimator("group_mean", "none", "arXiv 2503.20783"),
    "rloo": Estimator("leave_one_out", "none", "arXiv 2402.14740"),
    "opo": Estimator("length_weighted", "none", "arXiv 2505.23585"),
    "remax": Estimator("given", "none", "arXiv 2310.10505"),
    "reinforce_pp": Estimator("none", "token_whiten", "arXiv 2501.03262"),
    "reinforce_pp_baseline": Estimator("group_mean", "token_whiten", "arXiv 2501.03262"),
    "lite_ppo": Estimator("group_mean", "batch_std", "arXiv 2508.08221"),
}


@dataclass(frozen=True)
class Preset:
    """A peer's numbers: what it adds to a standard deviation, to a variance, its ddof, its rule for one sample."""

    std_eps: float
    variance_eps: float
    ddof: int
    singleton: str


PRESETS: dict[str | None, Preset] = {
    None: Preset(1e-6, 1e-8, 1, "zero"),
    "verl": Preset(1e-6, 1e-8, 1, "self"),
    "trl": Preset(1e-4, 1e-8, 1, "zero"),
}

METRICS = ("non_finite", "groups", "equal_groups", "singletons")


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    estimator: str = "grpo",
    eps: float | None = None,
    ddof: int | None = None,
    singleton: str | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    baseline_rewards: Tensor | None = None,
    preset: str | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Advantages of N samples, one each: float64 [N] for float64 rewards, else float32 [N]. Constants: no gradient.

    For a sample of reward r in a group of n with mean m and standard deviation s (L: response length, W: whitening
    over all tokens, (x - mean) / sqrt(var + eps)):

    ======================  ==================================
    grpo                    (r - m) / (s + eps)
    dr_grpo                 r - m
    rloo                    (r - m) n / (n - 1)
    opo                     r - sum(L r) / sum(L)
    remax                   r - baseline_rewards
    reinforce_pp            W(r), the discount being 1
    reinforce_pp_baseline   W(r - m)
    lite_ppo                (r - m) / (s of all rewards + eps)
    ======================  ==================================

    - Equal rewards: where all rewards that enter a group's statistics are equal, its advantages are exactly 0
      (after whitening, too; the group still counts in the whitening's mean and variance).
    - A reward (or baseline reward) that is NaN or infinite gives its own row 0, stays out of all statistics, and is
      counted.
    - Sums run in float64 or finer, in an order that no thread decides, so results are the same bit for bit.

    Args:
        rewards: [N] float32, float64, bfloat16 or float16.
        group_ids: [N] integers, of any value and in any order; equal ids make a group.
        estimator: a row of ESTIMATORS.
        eps: added to the standard deviation (default 1e-6; "trl" 1e-4), or to the variance that whitens (1e-8).
        ddof: 1 (default) divides the squared distances by n - 1, 0 by n.
        singleton: a group with one finite reward gets "zero", or by "self" its reward with mean 0 and deviation 1.
        lengths, mask, cu_seqlens: response lengths as integers [N], as a token mask [N, T], or as offsets [N + 1]; one
            of them is needed by opo, reinforce_pp and reinforce_pp_baseline. A response without tokens gets 0 from
            the two that whiten.
        baseline_rewards: [N], remax only: the reward of the greedy response to the same prompt.
        preset: "verl" or "trl": that project's eps, ddof and singleton rule, where not given here.
        return_metrics: also return integers on the same device: rewards left out ("non_finite"), "groups", groups of
            two or more with equal rewards ("equal_groups"), "singletons".

    Raises:
        TypeError, ValueError: naming the argument.
    """
    row = _lookup(ESTIMATORS, estimator, "estimator")
    numbers = _lookup(PRESETS, preset, "preset")
    _check_rewards(rewards, "rewards", None)
    size = rewards.shape[0]
    if not isinstance(group_ids, Tensor) or group_ids.dtype not in _INTEGERS:
        raise TypeError(f"group_ids: expected a tensor of integers, got {_kind(group_ids)}; number the groups")
    if group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids: expected one id per reward, [{size}], got {list(group_ids.shape)}")
    singleton = numbers.singleton if singleton is None else singleton
    if singleton not in ("zero", "self"):
        raise ValueError(f'singleton: expected "zero" or "self", got {singleton!r}')
    ddof = numbers.ddof if ddof is None else ddof
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof!r}")
    if eps is None:
        eps = numbers.variance_eps if row.scale == "token_whiten" else numbers.std_eps
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps!r}")
    if (baseline_rewards is not None) != (row.baseline == "given"):
        need = "needs the greedy responses' rewards" if row.baseline == "given" else "takes none; use estimator='remax'"
        raise ValueError(f"baseline_rewards: estimator {estimator!r} {need}")
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    if baseline_rewards is not None:
        _check_rewards(baseline_rewards, "baseline_rewards", size)
        baseline_rewards = baseline_rewards.detach().to(dtype).contiguous()
    response_lengths = _lengths(lengths, mask, cu_seqlens, size)
    if row.baseline != "length_weighted" and row.scale != "token_whiten":
        response_lengths = None
    elif response_lengths is None:
        raise ValueError(f"lengths: estimator {estimator!r} needs them; pass lengths, mask or cu_seqlens")
    for name, tensor in (
        ("group_ids", group_ids),
        ("lengths", response_lengths),
        ("baseline_rewards", baseline_rewards),
    ):
        if tensor is not None and tensor.device != rewards.device:
            raise ValueError(f"{name}: expected the device of rewards, {rewards.device}, got {tensor.device}")
    _native.require_kernels(rewards, "rewards", "group_advantages")

    advantages, counts = torch.ops.pykern.group_advantages.default(
        rewards.detach().to(dtype).contiguous(),
        group_ids.to(torch.int64).contiguous(),
        response_lengths,
        baseline_rewards,
        BASELINES.index(row.baseline),
        SCALES.index(row.scale),
        float(eps),
        ddof,
        singleton == "self",
    )
    if return_metrics:
        return advantages, dict(zip(METRICS, counts.unbind()))
    return advantages


@torch.library.register_fake("pykern::group_advantages")
def _group_advantages_fake(rewards, group_ids, lengths, baseline_rewards, baseline, scale, eps, ddof, singleton_self):
    return rewards.new_empty(rewards.shape), group_ids.new_empty(len(METRICS))


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _lookup(table: dict, name: object, argument: str):
    if name not in table:
        raise ValueError(f"{argument}: expected one of {', '.join(str(key) for key in table)}, got {name!r}")
    return table[name]


def _check_rewards(rewards: Tensor, name: str, size: int | None) -> None:
    if not isinstance(rewards, Tensor) or rewards.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {_kind(rewards)}; convert it with .float()")
    if rewards.dim() != 1 or (size is not None and rewards.shape[0] != size):
        wanted = "N" if size is None else size
        raise ValueError(f"{name}: expected one value per sample, [{wanted}], got {list(rewards.shape)}")


def _lengths(lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, size: int) -> Tensor | None:
    """Whichever of the three ways was used, as int64 [N]."""
    given = [
        name for name, value in (("lengths", lengths), ("mask", mask), ("cu_seqlens", cu_seqlens)) if value is not None
    ]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected one of lengths, mask and cu_seqlens, got also {given[0]}")
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != size:
            raise ValueError(f"mask: expected one row per sample, [{size}, T], got {list(mask.shape)}")
        return (mask != 0).sum(dim=1)
    name, value, entries = ("lengths", lengths, size) if lengths is not None else ("cu_seqlens", cu_seqlens, size + 1)
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected integers, got {value.dtype}")
    if list(value.shape) != [entries]:
        raise ValueError(f"{name}: expected [{entries}], got {list(value.shape)}")
    value = value.to(torch.int64)
    return value.contiguous() if lengths is not None else value.diff()
