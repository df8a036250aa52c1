"""The choice of the subspace."""

import pytest
import torch

from pykern.lowrank.matrices import compresses_right
from pykern.lowrank.projectors import gram_projector
from pykern.reference.lowrank import leading_vectors


def decaying(rows, columns, dtype=torch.float64):
    """A matrix whose singular values are 1, 1/2, 1/4, ..."""
    count = min(rows, columns)
    left, right = torch.linalg.qr(torch.randn(rows, count))[0], torch.linalg.qr(torch.randn(columns, count))[0]
    return (left * 2.0 ** -torch.arange(count) @ right.T).to(dtype)


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20), (1, 7), (7, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_leading_singular_vectors(dtype, shape, right):
    grad = decaying(*shape, dtype)
    rank = min(4, *shape)
    basis = gram_projector(grad, rank, right)
    expected = leading_vectors(grad.double(), rank, right)
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert basis.is_contiguous() and basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()
    basis = basis.double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5)
    # Column by column up to the sign: the leading vector comes first.
    torch.testing.assert_close((basis * expected).sum(0).abs(), torch.ones(rank).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("shape", [(30, 10), (10, 30)], ids=str)
def test_rank_deficient_gradient_gives_an_orthonormal_basis(shape, right):
    grad = torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    basis = gram_projector(grad, 5, right)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5), rtol=0, atol=1e-5)
    kept = grad @ basis if right else basis.T @ grad
    assert kept.norm().item() == pytest.approx(grad.norm().item(), rel=1e-5)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_any_magnitude(factor):
    grad = decaying(20, 8, torch.float32)
    scaled = gram_projector(grad * factor, 3, True)
    torch.testing.assert_close(scaled.abs(), gram_projector(grad, 3, True).abs(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
def test_a_gradient_that_names_no_subspace(right, bad):
    grad = torch.zeros(6, 4)
    grad[2, 3] = bad
    assert gram_projector(grad, 2, right) is None


def test_input_is_left_alone():
    grad = decaying(9, 5, torch.float32)
    before = grad.clone()
    gram_projector(grad, 2, True)
    assert torch.equal(grad, before)


@pytest.mark.parametrize(
    "side, tall, wide, square",
    [
        ("std", True, False, True),
        ("reverse_std", False, True, False),
        ("left", False, False, False),
        ("right", True, True, True),
    ],
)
def test_sides(side, tall, wide, square):
    assert compresses_right(8, 4, side) is tall
    assert compresses_right(4, 8, side) is wide
    assert compresses_right(4, 4, side) is square
