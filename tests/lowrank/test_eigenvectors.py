"""The iteration for the leading eigenvectors: its energy on every kind of spectrum, and when it gives way."""

import pytest
import torch

from pykern.lowrank import projectors
from pykern.lowrank.eigenvectors import iterates, leading_eigenvectors
from pykern.lowrank.projectors import PROJECTORS, Choice
from pykern.lowrank.subspace import Gradient, orthonormalize, polished
from tests.support import threads

ROWS, LENGTH, RANK = 520, 700, 130


@pytest.fixture(autouse=True)
def one_thread():
    """These matrices are too small to share, and a busy machine makes threads wait for each other."""
    with threads(1):
        yield


def power_law(exponent):
    return (1.0 + torch.arange(ROWS)) ** -exponent


SINGULAR_VALUES = {
    "power .25": power_law(0.25),
    "power .5": power_law(0.5),
    "power 1": power_law(1.0),
    "power 2": power_law(2.0),
    "clusters": torch.cat([torch.full((count,), 0.5**step) for step, count in enumerate((40, 80, 150, 250))]),
    "one cluster": torch.ones(ROWS),
    "low rank and noise": torch.where(torch.arange(ROWS) < 30, 10 * power_law(1.0), 0.02),
    "outliers": torch.where(torch.arange(ROWS) < 3, 1000.0, 1 + 0.2 * power_law(0.5)),
    "rank deficient": torch.where(torch.arange(ROWS) < 100, power_law(0.5), 0.0),
}


def matrix_of(values):
    left = torch.linalg.qr(torch.randn(ROWS, ROWS))[0]
    right = torch.linalg.qr(torch.randn(LENGTH, ROWS))[0]
    return (left * values) @ right.mT


def missed(basis, matrix, rank):
    """The share of the largest possible energy that a basis misses."""
    captured = (basis.mT.double() @ matrix.double()).square().sum()
    return 1 - (captured / torch.linalg.svdvals(matrix.double())[:rank].square().sum()).item()


@pytest.mark.parametrize("name", SINGULAR_VALUES)
def test_energy_on_every_spectrum(name):
    matrix = matrix_of(SINGULAR_VALUES[name])
    for given, rank in ((matrix, RANK), (matrix.mT, RANK), (matrix, 12)):
        basis = PROJECTORS["gram"].choose(Choice(given, rank, seed=1))
        torch.testing.assert_close(basis.mT @ basis, torch.eye(rank), rtol=0, atol=2e-6)
        assert missed(basis, given, rank) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_flat_gradients_of_every_dtype(dtype):
    """Normal numbers: no gap anywhere, and several rounds."""
    matrix = torch.randn(ROWS, LENGTH).to(dtype)
    basis = PROJECTORS["gram"].choose(Choice(matrix, RANK))
    assert basis.dtype == torch.float32 and missed(basis, matrix, RANK) < 1e-4


def test_the_iteration_serves_where_it_should(monkeypatch):
    """It ends on these by itself: the whole decomposition is only for what it can't tell."""

    def refused(gram, rank):
        raise AssertionError("the whole decomposition")

    monkeypatch.setattr(projectors, "all_eigenvectors", refused)
    for name in ("power .25", "power .5", "power 1", "power 2", "outliers", "low rank and noise"):
        assert PROJECTORS["gram"].choose(Choice(matrix_of(SINGULAR_VALUES[name]), RANK)) is not None
    assert PROJECTORS["gram"].choose(Choice(torch.randn(ROWS, LENGTH), RANK)) is not None


@pytest.mark.parametrize("failure", ["untold", "raised"])
def test_the_whole_decomposition_takes_over(monkeypatch, failure):
    def failing(*arguments):
        if failure == "raised":
            raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(projectors, "leading_eigenvectors", failing)
    matrix = torch.randn(ROWS, LENGTH)
    assert iterates(ROWS, 40)
    assert abs(missed(PROJECTORS["gram"].choose(Choice(matrix, 40)), matrix, 40)) < 1e-6


def test_vectors_come_largest_first():
    matrix = matrix_of(power_law(0.5))
    basis = PROJECTORS["gram"].choose(Choice(matrix, RANK))
    energies = (basis.mT @ matrix).square().sum(dim=1)
    expected = power_law(1.0)[:RANK]
    torch.testing.assert_close(energies, expected, rtol=0.15, atol=0)
    # The first few are the singular vectors themselves.
    left = torch.linalg.svd(matrix)[0][:, :5]
    torch.testing.assert_close((basis[:, :5] * left).sum(dim=0).abs(), torch.ones(5), rtol=0, atol=1e-3)


def test_a_start_without_the_gradient_and_one_with_it():
    for exponent in (0.5, 1.5):
        gradient = Gradient.of(matrix_of(power_law(exponent)))
        for sketch in (None, gradient.sketch):
            basis = leading_eigenvectors(gradient.gram(narrow=True), RANK, 3, sketch)
            assert missed(basis, gradient.matrix, RANK) < 1e-4


def test_a_gram_matrix_that_is_not_finite_or_zero():
    for value in (float("nan"), 0.0):
        try:
            assert leading_eigenvectors(torch.full((ROWS, ROWS), value), RANK) is None
        except torch.linalg.LinAlgError:
            assert value != 0.0


def test_products_of_a_gradient():
    matrix, vectors = torch.randn(300, 500), torch.linalg.qr(torch.randn(300, 20))[0]
    gradient = Gradient.of(matrix)
    exact = matrix.double() @ matrix.double().mT
    torch.testing.assert_close(gradient.gram().double(), exact, rtol=1e-5, atol=1e-3)
    narrow = matrix.bfloat16().double()
    torch.testing.assert_close(gradient.gram(narrow=True).double(), narrow @ narrow.mT, rtol=1e-5, atol=1e-3)
    product, energies, total = gradient.gram_times(vectors)
    torch.testing.assert_close(product.double(), exact @ vectors.double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(energies, (vectors.mT @ matrix).square().sum(dim=1))
    torch.testing.assert_close(total, matrix.square().sum())
    rough = gradient.gram_times(vectors, narrow=True)[0]
    assert 0 < (rough - product).norm() < 0.01 * product.norm()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_power_steps_from_a_stale_basis(exponent):
    matrix = matrix_of(power_law(exponent))
    drifted = matrix + 0.5 * matrix.norm() / matrix.numel() ** 0.5 * torch.randn_like(matrix)
    stale = PROJECTORS["gram"].choose(Choice(drifted, RANK))
    found = {name: PROJECTORS[name].choose(Choice(matrix, RANK, stale)) for name in ("power", "plain_power")}
    assert missed(found["power"], matrix, RANK) < 0.01
    if exponent == 0.5:
        assert missed(found["power"], matrix, RANK) < 0.7 * missed(found["plain_power"], matrix, RANK)


def test_the_shifted_power_step():
    matrix, basis = torch.randn(40, 60).double(), torch.linalg.qr(torch.randn(40, 6).double())[0]
    energies = (basis.mT @ matrix).square().sum(dim=1)
    shift = min((matrix.square().sum() - energies.sum()) / 34, energies.min() / 2)
    expected = torch.linalg.qr(matrix @ (matrix.mT @ basis) - shift * basis)[0]
    found = PROJECTORS["power"].choose(Choice(matrix, 6, previous=basis))
    torch.testing.assert_close(found @ found.mT, expected @ expected.mT, rtol=0, atol=1e-10)


def test_what_can_be_polished():
    basis = torch.linalg.qr(torch.randn(200, 30))[0]
    found = polished((basis + 1e-3 * torch.randn_like(basis)).contiguous())
    torch.testing.assert_close(found.mT @ found, torch.eye(30), rtol=0, atol=1e-6)
    assert polished(2 * basis) is None and polished(basis * float("nan")) is None


def test_columns_that_share_their_leading_few():
    """As after a product with large gaps: a factor fails in float32, and float64 is not needed."""
    leading = torch.linalg.qr(torch.randn(300, 3))[0]
    columns = torch.linalg.qr(torch.randn(300, 48))[0] + 1e5 * leading @ torch.randn(3, 48)
    found = orthonormalize(torch.cat([leading, columns], dim=1))
    torch.testing.assert_close(found.mT @ found, torch.eye(51), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["gram", "power"])
def test_repeats_are_bit_equal_and_threads_change_nothing_of_note(name):
    matrix, previous = torch.randn(ROWS, LENGTH), torch.linalg.qr(torch.randn(ROWS, RANK))[0]
    before = matrix.clone()
    found = []
    for count in (1, 2, 1):
        with threads(count):
            found.append(PROJECTORS[name].choose(Choice(matrix, RANK, previous, 7)))
    assert torch.equal(found[0], found[2]) and torch.equal(matrix, before)
    assert missed(found[1], matrix, RANK) == pytest.approx(missed(found[0], matrix, RANK), abs=1e-6)
