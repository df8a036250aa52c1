"""Inputs of group_advantages, and what its definition makes of them in float64."""

import torch
from torch import Tensor

import pykern
from pykern.policy.estimators import PRESETS, Estimator
from pykern.reference import policy_advantages as reference

ESTIMATORS = list(pykern.ESTIMATORS)
BY_LENGTH = ("length_weighted", "token_std", "token_whiten", "relative_length")
BY_GROUP = (
    "group_mean", "leave_one_out", "length_weighted", "group_std", "leave_one_out_std", "token_std", "beta", "best_gap",
    "pass_at_k", "pass_at_k_marginal", "pass_at_k_leave_one_out", "pass_at_k_minus_one", "relative_length",
)  # fmt: skip


def row_of(name: str, preset: str | None = None) -> Estimator:
    return PRESETS[preset].estimators.get(name, pykern.ESTIMATORS[name])


def parts_of(row: Estimator) -> tuple[str, str, str, str]:
    return row.transform, row.baseline, row.scale, row.finish


GROUPED = [name for name in ESTIMATORS if set(parts_of(row_of(name))) & set(BY_GROUP)]


def extras(name: str, rows: int, dtype=torch.float32, preset: str | None = None) -> dict:
    """The inputs that an estimator needs beside rewards and ids."""
    row, keywords = row_of(name, preset), {}
    if set(parts_of(row)) & set(BY_LENGTH):
        keywords["lengths"] = torch.randint(1, 40, (rows,))
    if row.baseline == "given":
        keywords["baseline_rewards"] = torch.rand(rows).to(dtype)
    if "pass_at_k" in row.transform:
        keywords["k"] = 2
    return keywords


def by_row(keywords: dict, rows: Tensor) -> dict:
    """The same for some of the rows."""
    return {key: value[rows] if isinstance(value, Tensor) else value for key, value in keywords.items()}


def numbers(name: str, preset: str | None = None) -> dict:
    """An estimator's parts and a preset's numbers, as the definition takes them."""
    row, peer = row_of(name, preset), PRESETS[preset]
    transform, baseline, scale, finish = parts_of(row)
    finish_eps = peer.std_eps if finish == "batch_std" else peer.variance_eps
    return {
        "transform": transform,
        "baseline": baseline,
        "scale": scale,
        "finish": finish,
        "decompose": row.decompose,
        "eps": peer.std_eps if row.eps is None else row.eps,
        "finish_eps": finish_eps if row.finish_eps is None else row.finish_eps,
        "ddof": peer.ddof if row.ddof is None else row.ddof,
        "singleton": peer.singleton,
        "fallback": row.fallback,
    }


def defined(name: str, rewards: Tensor, ids: Tensor, preset: str | None = None, **keywords):
    """The definition in float64: advantages, kept rows, metrics."""
    row = row_of(name, preset)
    if row.average and rewards.dim() == 2:
        keywords.setdefault("component_weights", [1 / rewards.shape[1]] * rewards.shape[1])
    keywords = numbers(name, preset) | {"relative_length": 1.0} | keywords
    if "baseline_rewards" in keywords:
        keywords["baseline_rewards"] = keywords["baseline_rewards"].double()
    return reference.group_advantages(rewards.double(), ids, **keywords)


def exact(name: str, rewards: Tensor, ids: Tensor, preset: str | None = None, **keywords) -> Tensor:
    return defined(name, rewards, ids, preset, **keywords)[0]


def sample(rows: int, dtype=torch.float32, name: str = "grpo") -> tuple[Tensor, Tensor]:
    """Ragged groups with negative and huge ids in no order; the last id occurs once."""
    ids = torch.randint(0, max(rows // 6, 1), (rows,)) * 1_000_000_007 - 5_000_000_000
    if rows:
        ids[-1] = torch.iinfo(torch.int64).min
    # A mean near zero, which maxrl divides by, has no digits; and pass@k asks how many rewards are above zero.
    thirds = torch.randint(0, 4, (rows,)) / 3
    rewards = thirds if name == "maxrl" or "pass_at_k" in row_of(name).transform else torch.randn(rows)
    return rewards.to(dtype), ids


def roundings(dtype: torch.dtype) -> float:
    """Of the result that the double sums of both sides may differ by."""
    return 1.0 if dtype != torch.float64 else 400.0
