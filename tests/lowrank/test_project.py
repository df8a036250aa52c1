"""The projection of a list of gradients, against its definition in float64."""

import pytest
import torch

from pykern.lowrank import ops
from pykern.reference import lowrank_parts as reference
from tests.lowrank.parts import DTYPES, SHAPES, columns, low_rank, matrices, one, projectors
from tests.support import assert_accurate, check_op, threads

SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])


def project(matrix, projector, grad_scale=None, squares=True, maximize=False):
    dtype = matrix[0].dtype
    shapes = [(*m.shape, p.shape[1]) for m, p in zip(matrix, projector, strict=True)]
    low = [tensor.fill_(float("nan")) for tensor in low_rank(dtype, matrix[0].device, shapes=shapes)]
    norms = [tensor.fill_(float("nan")) for tensor in columns(dtype, matrix[0].device, shapes=shapes)]
    ops.low_rank_project(matrix, projector, grad_scale, low, norms if squares else [], maximize=maximize)
    return low, norms


def hold(matrix, projector, scale=1.0, maximize=False):
    grad_scale = None if scale == 1.0 else one(scale, matrix[0].device)
    low, squares = project(matrix, projector, grad_scale, maximize=maximize)
    for i, (m, p) in enumerate(zip(matrix, projector, strict=True)):
        exact = reference.project(m.cpu().double(), p.cpu().double(), scale, maximize)
        own = reference.project(m.cpu().to(low[i].dtype), p.cpu().to(low[i].dtype), scale, maximize)
        assert_accurate(low[i], exact[0], own[0], units=8.0)
        assert_accurate(squares[i], exact[1], own[1], units=8.0)


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition(device, dtype, right):
    hold(matrices(dtype, device, right=right), projectors(dtype, device))


# More than one tile, slice and panel on each side, and rests of each.
@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_every_instruction_set(cpu_level, dtype, right):
    shapes = [(601, 333, 37), (259, 450, 130)]
    hold(matrices(dtype, right=right, shapes=shapes), projectors(dtype, shapes=shapes))


@SIDES
@pytest.mark.parametrize("scale, maximize", [(65536.0, False), (3.0, True)])
def test_scaled_gradients(device, scale, maximize, right):
    grads = [grad * scale for grad in matrices(torch.float32, device, right=right)]
    hold(grads, projectors(torch.float32, device), scale, maximize)


@SIDES
def test_nothing_between_the_lines_is_read(device, right):
    for dtype in (torch.float32, torch.bfloat16):
        hold(matrices(dtype, device, right=right, gap=3), projectors(dtype, device))


def test_matrices_of_both_orientations_in_one_list(device):
    both = [a if i % 2 else b for i, (a, b) in enumerate(zip(
        matrices(torch.float32, device, right=True), matrices(torch.float32, device), strict=True
    ))]  # fmt: skip
    hold(both, projectors(torch.float32, device))


def test_without_squares(device):
    grads, basis = matrices(torch.float32, device), projectors(torch.float32, device)
    low, squares = project(grads, basis, squares=False)
    expected, _ = project(grads, basis)
    assert all(torch.equal(a, b) for a, b in zip(low, expected, strict=True))
    assert all(square.isnan().all() for square in squares)


@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2)], ids=str)
def test_empty_matrices(device, shape):
    shapes = [shape, (6, 7, 2)]
    low, squares = project(
        matrices(torch.float32, device, shapes=shapes), projectors(torch.float32, device, shapes=shapes)
    )
    assert not low[0].any() and not squares[0].any()
    assert low[1].isfinite().all()


@SIDES
def test_bit_equal_for_any_number_of_threads(right):
    shapes = [(601, 333, 37), (90, 450, 20)]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            grads = matrices(torch.bfloat16, right=right, shapes=shapes)
            low, squares = project(grads, projectors(torch.bfloat16, shapes=shapes))
        results.append([*low, *squares])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_nan_reaches_its_column_alone(device):
    grads = matrices(torch.float32, device)
    grads[2][3, 200] = float("nan")
    low, squares = project(grads, projectors(torch.float32, device))
    hit = torch.zeros(301, dtype=torch.bool)
    hit[200] = True
    assert torch.equal(low[2].isnan().any(0).cpu(), hit) and torch.equal(squares[2].isnan().cpu(), hit)


def arguments(device):
    shapes = SHAPES[:2]
    return [
        matrices(torch.float32, device, shapes=shapes),
        projectors(torch.float32, device, shapes=shapes),
        one(2.0, device),
        low_rank(torch.float32, device, shapes=shapes),
        columns(torch.float32, device, shapes=shapes),
    ]


def test_opcheck(device):
    check_op(ops.low_rank_project, tuple(arguments(device)), {"maximize": False})


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, torch.zeros(17), r"matrix\[0\]: expected 2 dimensions"),
        (0, torch.zeros(17, 33, dtype=torch.int32), r"matrix\[0\]: expected float32"),
        (0, torch.zeros(17, 33, dtype=torch.float64), r"projector\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (0, torch.zeros(34, 66)[::2, ::2], r"matrix\[0\]: expected unit stride along one axis, got strides \(132, 2\)"),
        (1, torch.zeros(18, 5), r"projector\[0\]: expected size 17 in dimension 0, got 18"),
        (1, torch.zeros(5, 17).T, r"projector\[0\]: expected a contiguous tensor"),
        (1, torch.zeros(17, 0), r"projector\[0\]: expected at least one column"),
        (1, torch.zeros(17, 5).bfloat16(), r"projector\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (2, torch.zeros(2), "grad_scale: expected one element, got 2"),
        (2, torch.zeros((), dtype=torch.float64), "grad_scale: expected [a-z0-9]+, got [a-z0-9]+"),
        (3, torch.zeros(5, 34), r"low\[0\]: expected size 33 in dimension 1, got 34"),
        (3, torch.zeros(5, 33, dtype=torch.float64), r"low\[0\]: expected [a-z0-9]+, got [a-z0-9]+"),
        (4, torch.zeros(34), r"squares\[0\]: expected size 33"),
    ],
)
def test_refusals(device, index, value, message):
    given = arguments(device)
    if index == 2:
        given[2] = value.to(device)
    else:
        given[index][0] = value.to(device)
    with pytest.raises(RuntimeError, match=message):
        ops.low_rank_project(*given, maximize=False)


@pytest.mark.parametrize(
    "index, message",
    [
        (1, "projector: expected 2 tensors, got 1"),
        (3, "low: expected 2 tensors, got 1"),
        (4, "squares: expected 2 tensors or none, got 1"),
    ],
)
def test_refuses_lists_of_other_sizes(device, index, message):
    given = arguments(device)
    del given[index][1]
    with pytest.raises(RuntimeError, match=message):
        ops.low_rank_project(*given, maximize=False)
