"""The parts of policy_loss in any company, drawn at random, against the definition; its ops and its helpers."""

import math
import random

import pytest
import torch

import pykern
from pykern.policy.losses import (
    AGGREGATES,
    KL_ESTIMATORS,
    KL_GRADIENTS,
    METRICS,
    RATIOS,
    ROLLOUT_RULES,
    RULES,
    STABILISATIONS,
)
from pykern.reference import policy_loss as reference
from tests.policy.loss_cases import batch, differentiate, packed
from tests.support import assert_accurate, check_op, threads

TENSORS = (
    "mask", "cu_seqlens", "keep", "ref_logprobs", "anchor_logprobs", "anchor_keep", "rollout_logprobs",
    "rollout_weights", "entropy", "clip_low", "clip_high", "second_advantages", "advantage_weights", "token_weights",
)  # fmt: skip


def draw(seed: int) -> dict:
    """The definition's keywords for a random choice of every part, all numbers in a range where they act."""
    pick = random.Random(seed)
    maybe = lambda value, otherwise=None: value if pick.random() < 0.5 else otherwise  # noqa: E731
    return {
        "ratio": pick.choice(RATIOS),
        "rule": pick.choice(RULES),
        "stabilisation": pick.choice(STABILISATIONS),
        "clip_low": pick.choice([0.05, 0.3, math.inf]),
        "clip_high": pick.choice([0.05, 0.3, math.inf]),
        "ratio_limit": maybe(1.2, math.inf),
        "dual_clip": maybe(1.1, math.inf),
        "shape": (0.7, 1.3, 0.9, 0.6),
        "weight_negative_only": maybe(True, False),
        "negative_scale": maybe(0.6, 1.0),
        "stabilisation_low": 0.1,
        "stabilisation_high": 0.05,
        "kl": maybe(pick.choice(KL_ESTIMATORS)),
        "kl_gradient": pick.choice(KL_GRADIENTS),
        "kl_coef": 0.3,
        "anchor": maybe(pick.choice(KL_ESTIMATORS)),
        "anchor_coef": 0.2,
        "rollout_rule": pick.choice(ROLLOUT_RULES),
        "rollout_low": maybe(0.5, 0.0),
        "rollout_high": 1.5,
        "entropy_coef": 0.1,
        "aggregate": pick.choice(AGGREGATES),
        "count_empty": maybe(True, False),
        "denominator": maybe(41.0),
        "horizon": 50.0,
        "log_ratio_limit": maybe(0.5, math.inf),
        "sequence_log_ratio_low": maybe(-0.3, -math.inf),
        "sequence_log_ratio_high": maybe(0.3, math.inf),
        "kl_log_ratio_limit": maybe(0.6, math.inf),
        "kl_limit": maybe(0.2, math.inf),
    }


def draw_tensors(seed: int, keywords: dict, dtype: torch.dtype, form, rows=5, columns=23) -> tuple[tuple, dict]:
    """Inputs, and which of the optional ones take part."""
    pick = random.Random(seed + 1)
    torch.manual_seed(seed)
    values = batch(rows, columns, dtype, per_token=pick.random() < 0.5, poisoned=pick.random() < 0.5)
    values["old_logprobs"] = values["old_logprobs"] + torch.linspace(-0.2, 0.2, rows).to(dtype)[:, None]
    values = form(values)
    chosen = {name: values[name] for name in ("mask", "cu_seqlens") if name in values}
    if keywords["kl"] is not None:
        chosen["ref_logprobs"] = values["ref_logprobs"]
    if keywords["anchor"] is not None:
        chosen["anchor_logprobs"] = values["anchor_logprobs"]
    groups = [("keep",), ("anchor_keep",), ("rollout_logprobs",), ("rollout_weights",), ("entropy",), ("clip_low",),
              ("clip_high",), ("token_weights",)]  # fmt: skip
    if keywords["ratio"] != "clipped_sequence":
        groups.append(("second_advantages", "advantage_weights"))
    for group in groups:
        if pick.random() < 0.35:
            chosen |= {name: values[name] for name in group}
    return tuple(values[name] for name in ("logprobs", "old_logprobs", "advantages")), chosen


def raw_arguments(positional: tuple, tensors: dict, keywords: dict) -> tuple:
    """Arguments of the op for the definition's keywords, up to `with_gradient`."""
    index = lambda table, name: 0 if name is None else 1 + table.index(name)  # noqa: E731
    low, high = (0.0 if name in tensors else keywords[name] for name in ("clip_low", "clip_high"))
    clipped_logs = keywords["ratio"] == "clipped_sequence"
    choices = [
        RATIOS.index(keywords["ratio"]),
        RULES.index(keywords["rule"]),
        int(keywords["weight_negative_only"]),
        STABILISATIONS.index(keywords["stabilisation"]),
        index(KL_ESTIMATORS, keywords["kl"]),
        KL_GRADIENTS.index(keywords["kl_gradient"]),
        index(KL_ESTIMATORS, keywords["anchor"]),
        ROLLOUT_RULES.index(keywords["rollout_rule"]),
        AGGREGATES.index(keywords["aggregate"]),
        int(keywords["count_empty"]),
    ]
    numbers = (
        "ratio_limit", "dual_clip", "shape", "negative_scale", "stabilisation_low", "stabilisation_high",
        "log_ratio_limit", "sequence_log_ratio_low", "sequence_log_ratio_high", "kl_coef", "kl_log_ratio_limit",
        "kl_limit", "anchor_coef", "rollout_low", "rollout_high", "entropy_coef",
    )  # fmt: skip
    settings = [-low, high] if clipped_logs else [1 - low, 1 + high]
    for name in numbers:
        settings.extend(keywords[name] if name == "shape" else [keywords[name]])
    settings += [keywords["denominator"] or 0.0, keywords["horizon"]]
    return (*positional, *(tensors.get(name) for name in TENSORS), choices, settings)


def run_op(positional: tuple, tensors: dict, keywords: dict):
    """Loss, metrics and gradients straight from the op."""
    results = torch.ops.pykern.policy_loss_forward.default(*raw_arguments(positional, tensors, keywords), True)
    loss, coefficient, entropy_coefficient, metrics = results
    gradients = [coefficient, entropy_coefficient] if "entropy" in tensors else [coefficient]
    assert "entropy" in tensors or entropy_coefficient.numel() == 0
    return loss, dict(zip(METRICS, metrics)), *gradients


def define(positional: tuple, tensors: dict, keywords: dict, dtype=torch.float64):
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    return differentiate(reference.policy_loss, tuple(tensor.to(dtype) for tensor in positional), keywords | cast)


def check_draw(seed: int, form) -> None:
    keywords = draw(seed)
    for dtype in (torch.float64, torch.float32):
        positional, tensors = draw_tensors(seed, keywords, dtype, form)
        actual, exact = run_op(positional, tensors, keywords), define(positional, tensors, keywords)
        same = define(positional, tensors, keywords, dtype)
        for got, want, other in zip(actual[2:], exact[2:], same[2:]):
            assert_accurate(got, want, other, units=4096.0 if dtype == torch.float64 else 8.0)
        # Terms of either sign cancel in a sum; their roundings do not.
        terms = sum(gradient.abs().sum().item() for gradient in exact[2:])
        bound = lambda want: 64 * torch.finfo(dtype).eps * (abs(want) + terms + 1)  # noqa: E731
        assert abs(actual[0].item() - exact[0].item()) <= bound(exact[0].item())
        for name, want in exact[1].items():
            assert abs(actual[1][name].item() - want.item()) <= bound(want.item()), name


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("form", [lambda tensors: tensors, packed], ids=["padded", "packed"])
@pytest.mark.parametrize("seed", range(60))
def test_any_parts_together(seed, form):
    check_draw(seed, form)


@pytest.mark.parametrize("seed", range(60, 80))
def test_any_parts_together_on_each_level(seed, cpu_level):
    check_draw(seed, lambda tensors: tensors)


@pytest.mark.parametrize("seed", range(12))
def test_same_bits_on_any_threads_and_again(seed):
    keywords = draw(seed)
    positional, tensors = draw_tensors(seed, keywords, torch.float32, packed, rows=4, columns=9001)
    with threads(1):
        first = run_op(positional, tensors, keywords)
    for count in (1, 2, 3):
        with threads(count):
            again = run_op(positional, tensors, keywords)
        assert all(torch.equal(before, after) for before, after in zip(first[2:], again[2:]))
        for name in METRICS:
            torch.testing.assert_close(again[1][name], first[1][name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("seed", range(6))
def test_opcheck(seed):
    keywords = draw(seed)
    positional, tensors = draw_tensors(
        seed, keywords, torch.float32, [lambda t: t, packed][seed % 2], rows=2, columns=9
    )
    tensors = {name: tensor.nan_to_num() for name, tensor in tensors.items()}
    positional = tuple(tensor.nan_to_num() for tensor in positional)
    raw = raw_arguments(positional, tensors, keywords)
    for gradient in (True, False):
        check_op(torch.ops.pykern.policy_loss_forward.default, (*raw, gradient))


@pytest.mark.usefixtures("everywhere")
def test_opcheck_of_the_other_ops():
    check_op(torch.ops.pykern.policy_loss_backward.default, (torch.tensor(2.0), torch.randn(3, 4)))
    mask = torch.rand(3, 4) < 0.5
    check_op(torch.ops.pykern.policy_loss_token_weights.default, (torch.randn(3, 4), mask, None, 3, True, 0.0, 1.0))


def test_weights_of_copo():
    entropies = torch.tensor([0.0, 0.5, 2.0])
    expected = torch.tensor([1 / (1 + math.exp(1.0)), 0.5, 1 / (1 + math.exp(-3.0))])
    torch.testing.assert_close(pykern.copo_weights(entropies, k=2.0), expected)
    forced = pykern.copo_weights(entropies, advantages=torch.tensor([1.0, 0.0, -1e-30]))
    assert forced[1] == 0 and (forced[[0, 2]] > 0).all()


def test_annealed_coefficient():
    assert pykern.annealed_coef(0, 80) == 5e-3
    assert pykern.annealed_coef(40, 80) == pytest.approx(3e-3)
    assert pykern.annealed_coef(500, 80) == pytest.approx(1e-3)
