"""Advantages of grouped samples: parts from the tables of estimators.py, computed by one op."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .estimators import BASELINES, ESTIMATORS, FILTERS, FINISHES, METRICS, PRESETS, SCALES, TRANSFORMS


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    estimator: str = "grpo",
    preset: str | None = None,
    transform: str | None = None,
    baseline: str | None = None,
    scale: str | None = None,
    finish: str | None = None,
    decompose: bool | None = None,
    component_weights: Sequence[float] | None = None,
    eps: float | None = None,
    finish_eps: float | None = None,
    ddof: int | None = None,
    singleton: str | None = None,
    k: int = 1,
    relative_length: float = 1.0,
    fallback: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    baseline_rewards: Tensor | None = None,
    answer_ids: Tensor | None = None,
    overlong: tuple[float, float, float] | None = None,
    filter: str = "none",
    window: tuple[float, float] = (0.0, 1.0),
    return_keep: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor | dict[str, Tensor], ...]:
    row = _lookup(ESTIMATORS, estimator, "estimator")
    numbers = _lookup(PRESETS, preset, "preset")
    row = numbers.estimators.get(estimator, row)
    transform = _part(TRANSFORMS, transform, row.transform, "transform")
    baseline = _part(BASELINES, baseline, row.baseline, "baseline")
    scale = _part(SCALES, scale, row.scale, "scale")
    finish = _part(FINISHES, finish, row.finish, "finish")
    filter = _part(FILTERS, filter, "none", "filter")
    singleton = numbers.singleton if singleton is None else singleton
    if singleton not in ("zero", "self"):
        raise ValueError(f'singleton: expected "zero" or "self", got {singleton!r}')
    ddof = _first(ddof, row.ddof, numbers.ddof)
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof!r}")
    eps = _first(eps, row.eps, numbers.std_eps)
    finish_eps = _first(finish_eps, row.finish_eps, numbers.std_eps if finish == "batch_std" else numbers.variance_eps)
    fallback = row.fallback if fallback is None else fallback
    for name, value in (("eps", eps), ("finish_eps", finish_eps), ("fallback", fallback)):
        if not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an integer of at least 1, got {k!r}")

    _check_floats(rewards, "rewards")
    if rewards.dim() not in (1, 2) or (rewards.dim() == 2 and not 1 <= rewards.shape[1] <= MAX_COMPONENTS):
        raise ValueError(
            f"rewards: expected one value per sample, [N], or up to {MAX_COMPONENTS} components, [N, K], "
            f"got {list(rewards.shape)}"
        )
    size, components = rewards.shape[0], 1 if rewards.dim() == 1 else rewards.shape[1]
    _check_ids(group_ids, "group_ids", size)
    if component_weights is None:
        weights = [1.0 / components if row.average else 1.0] * components
    else:
        weights = [float(weight) for weight in component_weights]
        if len(weights) != components or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"component_weights: expected {components} finite numbers, got {component_weights!r}")
    if (baseline_rewards is not None) != (baseline == "given"):
        need = "needs the greedy responses' rewards" if baseline == "given" else "takes none; use estimator='remax'"
        raise ValueError(f"baseline_rewards: estimator {estimator!r} {need}")
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    if baseline_rewards is not None:
        _check_floats(baseline_rewards, "baseline_rewards")
        if list(baseline_rewards.shape) != [size]:
            raise ValueError(
                f"baseline_rewards: expected one value per sample, [{size}], got {list(baseline_rewards.shape)}"
            )
        baseline_rewards = baseline_rewards.detach().to(dtype).contiguous()
    longest, buffer, factor = _overlong(overlong)
    response_lengths = _lengths(lengths, mask, cu_seqlens, size)
    by_length = (
        baseline == "length_weighted"
        or scale == "token_std"
        or finish == "token_whiten"
        or transform == "relative_length"
    )
    if not by_length and overlong is None:
        response_lengths = None
    elif response_lengths is None:
        user = f"estimator {estimator!r}" if by_length else "overlong"
        raise ValueError(f"lengths: {user} needs them; pass lengths, mask or cu_seqlens")
    if answer_ids is not None:
        _check_ids(answer_ids, "answer_ids", size)
    for name, tensor in (
        ("group_ids", group_ids),
        ("lengths", response_lengths),
        ("baseline_rewards", baseline_rewards),
        ("answer_ids", answer_ids),
    ):
        if tensor is not None and tensor.device != rewards.device:
            raise ValueError(f"{name}: expected the device of rewards, {rewards.device}, got {tensor.device}")
    _native.require_kernels(rewards, "rewards", "group_advantages")

    values = rewards.detach().to(dtype).contiguous()
    ids = group_ids.to(torch.int64).contiguous()
    advantages, keep, counts = torch.ops.pykern.group_advantages.default(
        values if values.dim() == 2 else values.unsqueeze(1),
        weights,
        ids,
        response_lengths,
        baseline_rewards,
        row.decompose if decompose is None else decompose,
        TRANSFORMS.index(transform),
        BASELINES.index(baseline),
        SCALES.index(scale),
        FINISHES.index(finish),
        FILTERS.index(filter),
        ddof,
        singleton == "self",
        [eps, finish_eps, k, longest, buffer, factor, relative_length, fallback, *window],
    )
    results = (advantages,)
    if return_keep:
        results += (keep,)
    if return_metrics:
        results += (dict(zip(METRICS, counts.unbind())),)
    return results if len(results) > 1 else advantages


@torch.library.register_fake("pykern::group_advantages")
def _group_advantages_fake(
    rewards, component_weights, group_ids, lengths, baseline_rewards, decompose, transform, baseline, scale, finish,
    filter, ddof, singleton_self, settings,
):  # fmt: skip
    rows = rewards.shape[0]
    return (
        rewards.new_empty(rows),
        rewards.new_empty(rows, dtype=torch.bool),
        group_ids.new_empty(len(METRICS)),
    )


@torch.library.register_fake("pykern::group_entropy")
def _group_entropy_fake(group_ids, answer_ids):
    return group_ids.new_empty(group_ids.shape, dtype=torch.float64), torch.empty_like(group_ids)


MAX_COMPONENTS = 16
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _lookup(table: dict, name: object, argument: str):
    if name not in table:
        raise ValueError(f"{argument}: expected one of {', '.join(str(key) for key in table)}, got {name!r}")
    return table[name]


def _part(names: tuple[str, ...], name: str | None, default: str, argument: str) -> str:
    if name is None:
        return default
    if name not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {name!r}")
    return name


def _first(*values):
    return next(value for value in values if value is not None)


def _check_floats(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {_kind(tensor)}; convert it with .float()")


def _check_ids(ids: Tensor, name: str, size: int) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected a tensor of integers, got {_kind(ids)}; number the groups")
    if list(ids.shape) != [size]:
        raise ValueError(f"{name}: expected one id per reward, [{size}], got {list(ids.shape)}")


def _overlong(overlong: tuple[float, float, float] | None) -> tuple[float, float, float]:
    if overlong is None:
        return 0.0, 0.0, 0.0
    longest, buffer, factor = overlong
    if not buffer > 0:
        raise ValueError(f"overlong: expected (longest, buffer, factor) with a buffer above 0, got {overlong!r}")
    return longest, buffer, factor


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
