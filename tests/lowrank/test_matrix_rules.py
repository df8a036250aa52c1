"""Adafactor and Newton-Schulz as inner rules, on their own and in a step."""

import pytest
import torch

import pykern
from pykern.lowrank.matrix_rules import SHAPE_SCALES, orthogonalized
from pykern.reference import lowrank_methods as methods
from tests.support import assert_accurate, threads

RULES = ["adafactor", "newton_schulz"]


def matrix(rows, columns, dtype=torch.float32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def optimizer_of(rule, param, **options):
    basis = torch.eye(len(param))[:, :4]
    return pykern.LowRankOptimizer([param], 0.05, rule=rule, rank=4, projector=basis, **options)


def stepped(rule, gradients, **options):
    """The parameter and its state after these gradients."""
    param = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = optimizer_of(rule, param, side="left", **options)
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 33), (5, 5), (12, 64), (64, 1000)])
def test_orthogonalized(rows, columns):
    """As accurate as the same products in PyTorch, with singular values near one."""
    given = matrix(rows, columns)
    (result,) = orthogonalized([given])
    assert_accurate(result, methods.newton_schulz(given.double()), methods.newton_schulz(given), units=4)
    values = torch.linalg.svdvals(orthogonalized([matrix(rows, columns, torch.float64)])[0])
    assert values.min() > 0.3 and values.max() < 1.3


def test_orthogonalized_in_groups():
    """Matrices of one shape share their products, in whatever order they come."""
    given = [matrix(3, 8), matrix(4, 6, seed=1), matrix(3, 8, seed=2), torch.zeros(4, 6)]
    for one, result in zip(given, orthogonalized(given), strict=True):
        torch.testing.assert_close(result, methods.newton_schulz(one), rtol=1e-5, atol=1e-6)
    assert orthogonalized([]) == []


def test_muon_in_the_whole_space():
    """With P the identity it is torch's Muon, which rounds to bfloat16 on its way."""
    start = matrix(24, 16)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True}
    mine = pykern.LowRankOptimizer([ours], rule="newton_schulz", rank=16, projector=torch.eye(16), **settings)
    peer = torch.optim.Muon([theirs], **settings)
    for seed in range(4):
        # Equal singular values, which the iteration moves alike whatever the rounding.
        gradient = torch.linalg.qr(matrix(24, 16, seed=seed))[0]
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        peer.step()
        assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()


@pytest.mark.parametrize("shape_scale", SHAPE_SCALES)
@pytest.mark.parametrize("shape", [(32, 8), (8, 32)], ids=str)
def test_scales_by_shape(shape, shape_scale):
    """They go by the weight as it is, rows over columns, on both sides."""
    gradient, (rows, columns) = matrix(*shape), shape
    results = {}
    for scale in ("none", shape_scale):
        param = torch.nn.Parameter(torch.zeros(shape))
        param.grad = gradient.clone()
        pykern.LowRankOptimizer([param], 1.0, rule="newton_schulz", rank=3, shape_scale=scale).step()
        results[scale] = param.detach()
    factor = {
        "original": max(1, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * 32**0.5,
        "spectral": (rows / columns) ** 0.5,
        "none": 1.0,
    }[shape_scale]
    torch.testing.assert_close(results[shape_scale], factor * results["none"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rule", RULES)
def test_skipped_step_changes_nothing(rule, momentum):
    """A GradScaler that found an infinity; what it found is not read."""
    param = torch.nn.Parameter(matrix(8, 12))
    optimizer = optimizer_of(rule, param, momentum=momentum, side="left")
    for _ in range(2):
        param.grad = matrix(8, 12, seed=1)
        optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[param].items()}
    weight = param.detach().clone()
    param.grad = torch.full((8, 12), float("nan"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(param, weight)
    for name, value in optimizer.state[param].items():
        assert torch.equal(value, before[name]), name
    optimizer.found_inf = torch.tensor(0.0)
    param.grad = 8 * matrix(8, 12, seed=2)
    optimizer.step()
    optimizer.grad_scale = optimizer.found_inf = None
    scaled = param.detach().clone()
    with torch.no_grad():
        param.copy_(weight)
    for name, value in optimizer.state[param].items():
        value.copy_(before[name])
    param.grad = matrix(8, 12, seed=2)
    optimizer.step()
    torch.testing.assert_close(param.detach(), scaled, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradient_and_zero_rate(rule):
    """Neither is divided by."""
    weight, _ = stepped(rule, [torch.zeros(6, 10)] * 2, momentum=0.9)
    assert torch.equal(weight, torch.zeros(6, 10))
    for rate in (0.0, torch.tensor(0.0)):
        param = torch.nn.Parameter(matrix(6, 10))
        optimizer = pykern.LowRankOptimizer([param], rate, rule=rule, rank=4, momentum=0.9)
        param.grad = matrix(6, 10, seed=1)
        optimizer.step()
        assert torch.equal(param, matrix(6, 10)) and optimizer.state[param]["step"] == 1


@pytest.mark.parametrize("rule", RULES)
def test_rate_as_a_tensor(rule):
    gradients = [matrix(6, 10, seed=seed) for seed in range(3)]
    results = []
    for rate in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        param = torch.nn.Parameter(torch.zeros(6, 10))
        optimizer = pykern.LowRankOptimizer([param], rate, rule=rule, rank=4, momentum=0.9)
        for gradient in gradients:
            param.grad = gradient.clone()
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(64, 3000), (1, 100_000)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_repeats_bit_for_bit(rule, shape):
    """A single long row, too, which PyTorch's own sum splits between threads."""
    gradients = [matrix(*shape, seed=seed) for seed in range(2)]
    results = []
    for count in (1, 1, 2, 3):
        with threads(count):
            results.append(stepped(rule, gradients, momentum=0.9)[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_states():
    """Of Adafactor vectors alone, and no average where there is no momentum."""
    assert pykern.LowRankOptimizer([matrix(6, 10)], rule="newton_schulz").param_groups[0]["momentum"] == 0.95
    shapes = {
        name: tuple(value.shape)
        for name, value in stepped("adafactor", [matrix(6, 10)])[1].items()
        if name.startswith("exp_avg")
    }
    assert shapes == {"exp_avg_sq_row": (4,), "exp_avg_sq_col": (10,)}
    assert stepped("adafactor", [matrix(6, 10)], momentum=0.9)[1]["exp_avg"].shape == (4, 10)
    assert "exp_avg" not in stepped("newton_schulz", [matrix(6, 10)], momentum=0.0)[1]


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_weights_keep_float32_states(rule):
    gradients = [matrix(6, 10, torch.bfloat16, seed) for seed in range(3)]
    weight, state = stepped(rule, gradients, momentum=0.9)
    exact, _ = stepped(rule, [gradient.float() for gradient in gradients], momentum=0.9)
    assert weight.dtype == torch.bfloat16 and state["exp_avg"].dtype == torch.float32
    assert (weight.float() - exact).norm() < 0.02 * exact.norm()


def test_checkpoint_goes_on_bit_for_bit():
    gradients = [matrix(6, 10, seed=seed) for seed in range(4)]
    for rule in RULES:
        whole, _ = stepped(rule, gradients, momentum=0.9)
        param = torch.nn.Parameter(torch.zeros(6, 10))
        first = optimizer_of(rule, param, momentum=0.9, side="left")
        for gradient in gradients[:2]:
            param.grad = gradient.clone()
            first.step()
        second = optimizer_of(rule, param, momentum=0.9, side="left")
        second.load_state_dict(first.state_dict())
        for gradient in gradients[2:]:
            param.grad = gradient.clone()
            second.step()
        assert torch.equal(param, whole)
