"""The residual's ratios and its limit, against their definitions in float64."""

import pytest
import torch

from pykern.lowrank import ops
from pykern.reference import lowrank_parts as reference
from tests.lowrank.parts import SHAPES as ALL_SHAPES, columns, low_rank, one
from tests.support import assert_accurate, check_op, poison, threads

SHAPES = ALL_SHAPES[1:4]
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
LIMIT = {
    "scale": 0.3,
    "removed": 0.7,
    "per_tensor": False,
    "amplitude": 2.0,
    "amplitude_first": False,
    "growth": 1.01,
    "zero_norm_limits": False,
}


def problem(dtype, device="cpu", shapes=SHAPES):
    """Low-rank gradients, directions, columns' squares and P^T P R as one gradient could have them."""
    low = low_rank(dtype, device, shapes=shapes)
    direction = low_rank(dtype, device, seed=400, shapes=shapes)
    extra = columns(dtype, device, shapes=shapes)
    gram = [1.1 * matrix for matrix in low]
    squares = [(matrix * other).sum(0) + square for matrix, other, square in zip(low, gram, extra, strict=True)]
    return low, direction, squares, gram


def ratios(low, direction, squares, gram, **options):
    phi = [poison(torch.empty_like(square)) for square in squares]
    sums = poison(torch.empty(len(low), 3, dtype=torch.float64, device=low[0].device))
    ops.low_rank_ratios(low, direction, squares, gram, phi, sums, **options)
    return phi, sums


@TYPES
@pytest.mark.parametrize("per_tensor", [False, True], ids=["channel", "tensor"])
@pytest.mark.parametrize("removed, orthonormal", [(None, True), (1.0, True), (1.0, False), (0.25, False)])
def test_ratios(device, dtype, per_tensor, removed, orthonormal):
    low, direction, squares, gram = problem(dtype, device)
    options = {"per_tensor": per_tensor, "removed": removed}
    phi, sums = ratios(low, direction, squares, [] if orthonormal else gram, **options)
    for i, tensors in enumerate(zip(low, direction, squares, gram, strict=True)):
        tensors = [tensor.cpu() for tensor in tensors[: 3 if orthonormal else 4]]
        exact = reference.ratios(*(tensor.double() for tensor in tensors), **options)
        own = reference.ratios(*tensors, **options)
        assert_accurate(phi[i], exact[0], own[0], units=4.0)
        torch.testing.assert_close(sums[i].cpu(), exact[1], rtol=1e-13 if dtype == torch.float64 else 3e-6, atol=0)


@pytest.mark.parametrize("removed", [None, 0.5])
def test_ratios_on_every_instruction_set(cpu_level, removed):
    tensors = problem(torch.float32, shapes=[(0, 700, 40)])
    phi, sums = ratios(*tensors, per_tensor=False, removed=removed)
    exact = reference.ratios(*(tensor[0].double() for tensor in tensors), per_tensor=False, removed=removed)
    assert_accurate(phi[0], exact[0], units=8.0)
    torch.testing.assert_close(sums[0], exact[1], rtol=3e-6, atol=0)


def test_a_gradient_inside_the_subspace_leaves_nothing(device):
    """Sums of squares that differ by rounding alone: what is left counts as nothing."""
    low = [torch.randn(4, 300, device=device)]
    squares = [low[0].square().sum(0) * (1 + 1e-6 * torch.randn(300, device=device))]
    _, sums = ratios(low, [torch.randn(4, 300, device=device)], squares, [], per_tensor=False, removed=1.0)
    assert sums[0, 2].item() == 0


def test_zero_gradients_have_the_ratio_of_the_epsilon(device):
    low, zeros = [torch.zeros(3, 5, device=device)], [torch.zeros(5, device=device)]
    direction = [torch.full((3, 5), 2.0, device=device)]
    phi, _ = ratios(low, direction, zeros, [], per_tensor=False, removed=None)
    torch.testing.assert_close(phi[0].cpu(), torch.full((5,), 12.0**0.5 / 1e-8))


def limited(dtype, device, norm, found_inf=None, scale=None, maximize=False, **options):
    """(problem, ratios, sums) and what the op made of them: directions, factors, norms."""
    low, direction, squares, gram = problem(dtype, device)
    options = {**LIMIT, **options}
    shared = {name: options[name] for name in ("per_tensor", "removed")}
    phi, sums = ratios(low, direction, squares, gram, **shared)
    combined, factors = [tensor.clone() for tensor in direction], [tensor.clone() for tensor in phi]
    norms = [] if norm is None else [torch.tensor(norm, dtype=dtype, device=device) for _ in low]
    grad_scale = None if scale is None else one(scale, device)
    ops.low_rank_limit(low, combined, factors, sums, norms, grad_scale, found_inf, maximize=maximize, **options)
    return (low, direction, phi, sums), (combined, factors, norms)


def hold(dtype, device, norm, scale=None, maximize=False, **options):
    given, made = limited(dtype, device, norm, scale=scale, maximize=maximize, **options)
    rules = {**LIMIT, **options, "grad_scale": scale or 1.0, "maximize": maximize}
    for i in range(len(SHAPES)):
        tensors = [tensors[i].cpu() for tensors in given]
        exact = reference.limit(*(tensor.double() for tensor in tensors), norm, **rules)
        if rules["removed"] is None:
            assert torch.equal(made[0][i].cpu(), tensors[1])
        else:
            # Of the larger of the two terms, whose difference it is.
            size = (rules["scale"] * tensors[1]).abs().max() + (exact[1] * (scale or 1.0) * tensors[0]).abs().max()
            error = (made[0][i].cpu().double() - exact[0]).abs().max()
            assert error <= 4 * torch.finfo(dtype).eps * size
        assert_accurate(made[1][i], exact[1], units=4.0)
        if norm is not None:
            torch.testing.assert_close(made[2][i].cpu().double().item(), exact[2], rtol=1e-6, atol=0)


KINDS = pytest.mark.parametrize("per_tensor, removed", [(False, 0.7), (False, None), (True, None)])


# The norms of the residuals are around 10: before them is none, an older one that limits, and one that doesn't.
@pytest.mark.parametrize("norm", [None, -1.0, 0.0, 0.5, 1e6])
@KINDS
def test_limit(device, norm, per_tensor, removed):
    hold(torch.float32, device, norm, per_tensor=per_tensor, removed=removed)


@TYPES
@KINDS
def test_limit_of_the_amplified(device, dtype, per_tensor, removed):
    hold(dtype, device, 0.5, per_tensor=per_tensor, removed=removed, amplitude_first=True)


@pytest.mark.parametrize("options", [{"growth": 0.0}, {"growth": 2.0}, {"zero_norm_limits": True}], ids=str)
@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_limit_options(device, options, norm):
    hold(torch.float32, device, norm, **options)


@pytest.mark.parametrize("removed", [None, 0.7])
@pytest.mark.parametrize("scale, maximize", [(8.0, False), (None, True), (8.0, True)])
def test_factors_are_of_the_gradient_as_it_came(device, scale, maximize, removed):
    hold(torch.float32, device, 0.5, scale=scale, maximize=maximize, removed=removed)


def test_found_inf_keeps_the_norm(device):
    for flag, kept in ((1.0, True), (0.0, False)):
        _, made = limited(torch.float32, device, 0.5, found_inf=one(flag, device))
        assert all((norm.item() == 0.5) is kept for norm in made[2])


def test_limit_on_every_instruction_set(cpu_level):
    hold(torch.float32, torch.device("cpu"), 0.5)


def test_a_nan_reaches_the_factors(device):
    low, direction, squares, gram = problem(torch.float32, device, shapes=[(0, 9, 3)])
    low[0][1, 4] = float("nan")
    phi, sums = ratios(low, direction, squares, gram, per_tensor=False, removed=1.0)
    assert phi[0].isnan().nonzero().flatten().tolist() == [4] and sums[0, 1:].isnan().all()
    norm = [one(0.5, device)]
    ops.low_rank_limit(low, direction, phi, sums, norm, None, None, maximize=False, **LIMIT)
    assert phi[0].isnan().all() and norm[0].isnan()


@pytest.mark.parametrize("shape", [(0, 0, 4), (0, 6, 0)], ids=str)
def test_empty_matrices(device, shape):
    tensors = problem(torch.float32, device, shapes=[shape, (0, 9, 3)])
    phi, sums = ratios(*tensors, per_tensor=False, removed=None)
    assert not phi[0].any() and not sums[0, :2].any() and phi[1].all() and sums[1].all()
    norms = [one(-1.0, device) for _ in range(2)]
    ops.low_rank_limit(tensors[0], tensors[1], phi, sums, norms, None, None, maximize=False, **LIMIT)
    assert norms[0].item() == 0 and norms[1].item() > 0


def test_empty_lists(device):
    sums = torch.empty(0, 3, dtype=torch.float64, device=device)
    ops.low_rank_ratios([], [], [], [], [], sums, per_tensor=False, removed=None)
    ops.low_rank_limit([], [], [], sums, [], None, None, maximize=False, **LIMIT)


def test_bit_equal_for_any_number_of_threads():
    results = []
    for count in (1, 2, 3):
        with threads(count):
            low, direction, squares, gram = problem(torch.float32, shapes=[(0, 3001, 20)])
            phi, sums = ratios(low, direction, squares, gram, per_tensor=False, removed=0.7)
            ops.low_rank_limit(low, direction, phi, sums, [one(0.5)], None, None, maximize=False, **LIMIT)
        results.append([phi[0], sums, direction[0]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def ratio_arguments(device):
    low, direction, squares, gram = problem(torch.float32, device, shapes=ALL_SHAPES[:2])
    phi, sums = [torch.empty_like(square) for square in squares], torch.empty(2, 3, dtype=torch.float64, device=device)
    return [low, direction, squares, gram, phi, sums]


def limit_arguments(device):
    low, direction, squares, _ = problem(torch.float32, device, shapes=ALL_SHAPES[:2])
    sums, norms = torch.ones(2, 3, dtype=torch.float64, device=device), [one(0.5, device) for _ in range(2)]
    return [low, direction, squares, sums, norms, one(2.0, device), one(0.0, device)]


def test_opcheck(device):
    for removed in (None, 0.5):
        check_op(ops.low_rank_ratios, tuple(ratio_arguments(device)), {"per_tensor": False, "removed": removed})
        check_op(ops.low_rank_limit, tuple(limit_arguments(device)), {**LIMIT, "removed": removed, "maximize": False})


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, torch.zeros(5, 33, dtype=torch.float16), r"low\[0\]: expected float32 or float64"),
        (0, torch.zeros(5, 33, dtype=torch.float64), r"low\[1\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (1, torch.zeros(5, 34), r"direction\[0\]: expected size 33"),
        (1, torch.zeros(33, 5).T, r"direction\[0\]: expected a contiguous tensor"),
        (2, torch.zeros(32), r"squares\[0\]: expected size 33"),
        (3, torch.zeros(4, 33), r"low_gram\[0\]: expected size 5"),
        (4, torch.zeros(33, dtype=torch.float64), r"ratios\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (5, torch.zeros(3, 3, dtype=torch.float64), "sums: expected size 2 in dimension 0, got 3"),
        (5, torch.zeros(2, 3), "sums: expected [a-z0-9]+, got [a-z0-9]+"),
    ],
)
def test_refused_ratios(device, index, value, message):
    given = ratio_arguments(device)
    if index == 5:
        given[5] = value.to(device)
    else:
        given[index][0] = value.to(device)
    with pytest.raises(RuntimeError, match=message):
        ops.low_rank_ratios(*given, per_tensor=False, removed=None)


@pytest.mark.parametrize(
    "index, value, message",
    [
        (2, torch.zeros(34), r"ratios\[0\]: expected size 33"),
        (3, torch.zeros(2, 2, dtype=torch.float64), "sums: expected size 3"),
        (4, torch.zeros(2), r"residual_norm\[0\]: expected one element, got 2"),
        (4, torch.zeros((), dtype=torch.float64), r"residual_norm\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (5, torch.zeros(2), "grad_scale: expected one element, got 2"),
        (6, torch.zeros((), dtype=torch.float64), "found_inf: expected [a-z0-9]+, got [a-z0-9]+"),
    ],
)
def test_refused_limits(device, index, value, message):
    given = limit_arguments(device)
    if index in (3, 5, 6):
        given[index] = value.to(device)
    else:
        given[index][0] = value.to(device)
    with pytest.raises(RuntimeError, match=message):
        ops.low_rank_limit(*given, maximize=False, **LIMIT)


def test_refuses_lists_of_other_sizes(device):
    for index, name in ((1, "direction"), (2, "squares"), (3, "low_gram"), (4, "ratios")):
        given = ratio_arguments(device)
        del given[index][0]
        with pytest.raises(RuntimeError, match=f"{name}: expected 2 tensors"):
            ops.low_rank_ratios(*given, per_tensor=False, removed=None)
