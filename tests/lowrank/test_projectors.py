"""The projectors: bases from every kind of gradient, their energy, their draws."""

import math

import pytest
import torch

import pykern
from pykern.lowrank import dct
from pykern.lowrank.bases import basis_of
from pykern.lowrank.eigenvectors import leading_eigenvectors
from pykern.lowrank.matrices import Job
from pykern.lowrank.options import complete_group
from pykern.lowrank.projectors import PROJECTORS, Choice
from pykern.lowrank.subspace import Gradient, orthonormalize
from pykern.reference import lowrank as reference
from tests.support import threads

FROM_THE_GRADIENT = ("gram", "power", "plain_power", "randomized", "svd", "dct", "dct_l2", "rows", "rows_sampled")
DRAWN = ("random", "random_orthonormal", "apollo_torch", "coordinates")


@pytest.fixture(autouse=True)
def one_thread():
    """These matrices are too small to share, and a busy machine makes threads wait for each other."""
    with threads(1):
        yield


def decaying(rows, columns, tail, dtype=torch.float64):
    """A matrix with singular values (1 + i)^-tail and random singular vectors."""
    count = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(size, count, dtype=torch.float64))[0] for size in (rows, columns))
    return ((left * (1.0 + torch.arange(count, dtype=torch.float64)) ** -tail) @ right.T).to(dtype)


def vectors(name, chosen, matrix):
    """What a projector gave as P [n, rank]."""
    if chosen.dim() == 2:
        return chosen.double()
    if PROJECTORS[name].basis == "dct":
        return dct.vectors(chosen, matrix.shape[0], torch.float64)
    return torch.eye(matrix.shape[0], dtype=torch.float64)[:, chosen]


def energy(name, matrix, rank, **choice):
    """Captured energy relative to the best possible."""
    chosen = PROJECTORS[name].choose(Choice(matrix, rank, **choice))
    captured = (vectors(name, chosen, matrix).T @ matrix.double()).square().sum()
    return (captured / torch.linalg.svdvals(matrix.double())[:rank].square().sum()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(20, 45), (45, 20), (1, 6), (6, 1), (1, 1), (17, 17)], ids=str)
@pytest.mark.parametrize("name", PROJECTORS)
def test_bases_are_orthonormal_where_they_say_so(name, shape, dtype):
    matrix = decaying(*shape, 0.7, dtype)
    rank = min(5, *shape)
    for transposed in (matrix, matrix.mT.contiguous().mT):
        chosen = PROJECTORS[name].choose(Choice(transposed, rank, seed=3))
        if PROJECTORS[name].basis is None:
            assert chosen.shape == (shape[0], rank) and chosen.dtype in (torch.float32, torch.float64)
        else:
            assert chosen.shape == (rank,) and chosen.dtype == torch.int64 and chosen.unique().numel() == rank
        basis = vectors(name, chosen, matrix)
        if PROJECTORS[name].orthonormal:
            torch.testing.assert_close(basis.T @ basis, torch.eye(rank).double(), rtol=0, atol=2e-5)


def test_the_table_knows_which_bases_are_not_orthonormal():
    matrix = torch.randn(64, 80)
    for name, projector in PROJECTORS.items():
        basis = vectors(name, projector.choose(Choice(matrix, 8)), matrix)
        error = (basis.T @ basis - torch.eye(8)).abs().max()
        assert (error < 1e-5) == projector.orthonormal


@pytest.mark.parametrize(
    "shape, tail", [((400, 450), 0.0), ((400, 450), 0.5), ((450, 400), 1.0), ((400, 450), 3.0)], ids=str
)
def test_energy_of_the_exact_projectors(shape, tail):
    matrix = decaying(*shape, tail, torch.float32)
    assert energy("gram", matrix, 60) > 0.9999
    if tail > 0:
        assert energy("randomized", matrix, 60) > 0.97
        drifted = matrix + 0.3 * matrix.norm() / math.sqrt(matrix.numel()) * torch.randn(shape)
        stale = PROJECTORS["gram"].choose(Choice(drifted, 60))
        assert energy("power", matrix, 60, previous=stale) > 0.99


def test_leading_eigenvectors_by_iteration_are_those_of_the_whole_decomposition():
    """Also of a spectrum without a tail to speak of, and of one with a large gap."""
    for matrix in (torch.randn(400, 500), decaying(400, 500, 0.3, torch.float32), 1e3 * torch.eye(400)):
        matrix[:, :2] *= 1e3
        gram = matrix @ matrix.T
        found = leading_eigenvectors(gram, 40).double()
        torch.testing.assert_close(found.T @ found, torch.eye(40).double(), rtol=0, atol=1e-5)
        captured = (found * (gram.double() @ found)).sum()
        assert captured > 0.9999 * torch.linalg.eigvalsh(gram.double())[-40:].sum()


def test_a_gradient_of_lower_rank_than_the_block():
    """The iteration's bound is zero then, and the whole decomposition takes over."""
    matrix = torch.randn(400, 3) @ torch.randn(3, 500)
    assert energy("gram", matrix, 50) == pytest.approx(1.0, abs=1e-6)
    assert energy("power", matrix, 50, previous=torch.linalg.qr(torch.randn(400, 50))[0]) > 0.999


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", PROJECTORS)
def test_gradients_that_name_no_subspace(name, bad):
    matrix = torch.zeros(6, 9)
    matrix[2, 3] = bad
    chosen = PROJECTORS[name].choose(Choice(matrix, 4, previous=torch.eye(6)[:, :4]))
    if name in FROM_THE_GRADIENT:
        assert chosen is None
    else:
        assert chosen.isfinite().all()


@pytest.mark.parametrize("name", FROM_THE_GRADIENT)
def test_degenerate_gradients(name):
    one = torch.zeros(40, 30)
    one[7, 3] = 2.0
    rank_one = torch.outer(torch.randn(40), torch.randn(30))
    for matrix in (one, rank_one, 1e-30 * rank_one, 1e30 * rank_one, rank_one.repeat_interleave(2, 0)[:40]):
        chosen = PROJECTORS[name].choose(Choice(matrix, 6, previous=torch.eye(40)[:, 2:8], seed=1))
        basis = vectors(name, chosen, matrix)
        torch.testing.assert_close(basis.T @ basis, torch.eye(6).double(), rtol=0, atol=1e-5)
        if name in ("gram", "power", "randomized", "svd"):
            # The one direction that is there.
            kept = (basis.T @ matrix.double()).norm() / matrix.double().norm()
            assert kept == pytest.approx(1.0, abs=1e-4)
        elif name.startswith("rows") and matrix is one:
            assert chosen[0] == 7


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_svd_is_the_packages_bit_for_bit(dtype, right):
    grad = torch.randn(30, 22).to(dtype)
    left, _, right_vectors = torch.linalg.svd(grad.float(), full_matrices=False)
    expected = right_vectors[:5].T if right else left[:, :5]
    chosen = PROJECTORS["svd"].choose(Choice(grad.mT if right else grad, 5, right=right))
    assert torch.equal(chosen, expected)


def test_power_is_one_step_from_the_basis_in_use():
    matrix, previous = torch.randn(30, 50).double(), torch.linalg.qr(torch.randn(30, 6).double())[0]
    expected = torch.linalg.qr(matrix @ (matrix.T @ previous))[0]
    basis = PROJECTORS["plain_power"].choose(Choice(matrix, 6, previous=previous))
    torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-10)


def test_orthonormal_basis_of_nearly_dependent_columns():
    """Columns that depend on each other beyond float32 are completed; each is within the span of those up to it."""
    base = torch.linalg.qr(torch.randn(200, 10))[0]
    for spread in (1.0, 1e-3, 1e-6, 0.0):
        columns = base[:, :1] + spread * base
        found = orthonormalize(columns * 10.0 ** torch.arange(-5, 5))
        torch.testing.assert_close(found.T @ found, torch.eye(10), rtol=0, atol=1e-5)
        assert abs(found[:, 0] @ columns[:, 0]).item() == pytest.approx(columns[:, 0].norm().item(), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 100])
def test_dct_vectors_and_scores(n):
    rows, columns = torch.arange(n).double()[:, None], torch.arange(n).double()
    matrix = math.sqrt(2 / n) * torch.cos(torch.pi * rows * (2 * columns + 1) / (2 * n))
    matrix[0] *= math.sqrt(0.5)
    found = dct.vectors(torch.arange(n), n, torch.float64).T
    torch.testing.assert_close(found, matrix, rtol=0, atol=1e-13)
    torch.testing.assert_close(found @ found.T, torch.eye(n).double(), rtol=0, atol=1e-13)
    grad = torch.randn(n, 41).double()
    for power, expected in ((1, (matrix @ grad).abs().sum(1)), (2, (matrix @ grad).square().sum(1))):
        torch.testing.assert_close(dct.scores(Gradient.of(grad), power), expected, rtol=1e-11, atol=1e-11)
        name = "dct" if power == 1 else "dct_l2"
        chosen = PROJECTORS[name].choose(Choice(grad, min(5, n)))
        assert torch.equal(chosen, expected.argsort(descending=True)[: min(5, n)])


def test_a_large_dct_is_exact():
    """The angle of the last row is 4096 turns; float32 arithmetic would be wrong in the fourth digit."""
    n, indices = 4096, torch.tensor([0, 1, 4094, 4095])
    found = dct.vectors(indices, n, torch.float32).double()
    torch.testing.assert_close(found.T @ found, torch.eye(4).double(), rtol=0, atol=2e-7)
    turns = (indices[None, :] * (2 * torch.arange(n)[:, None] + 1)) % (4 * n)
    expected = math.sqrt(2 / n) * torch.cos(torch.pi * turns.double() / (2 * n))
    expected[:, 0] *= math.sqrt(0.5)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", DRAWN + ("rows_sampled", "randomized"))
def test_draws_depend_on_seed_and_refresh_alone(name):
    matrix = torch.randn(24, 30)

    def drawn(seed, refreshes=0, index=0):
        return PROJECTORS[name].choose(Choice(matrix, 6, seed=seed, refreshes=refreshes, index=index))

    assert torch.equal(drawn(1), drawn(1))
    other = drawn(1, 1) if name == "apollo_torch" else drawn(2)
    assert not torch.equal(drawn(1), other)


def test_scale_of_normal_draws():
    basis = PROJECTORS["random"].choose(Choice(torch.empty(4000, 1), 16))
    assert basis.std().item() == pytest.approx(0.25, rel=0.02)
    assert PROJECTORS["apollo_torch"].choose(Choice(torch.empty(4000, 1), 16)).std().item() == pytest.approx(0.25, 0.02)


def test_rows_are_drawn_in_proportion_to_their_norms():
    matrix = torch.tensor([4.0, 2.0, 1.0, 1.0])[:, None]
    first = [PROJECTORS["rows_sampled"].choose(Choice(matrix, 2, seed=seed))[0].item() for seed in range(2000)]
    shares = torch.bincount(torch.tensor(first), minlength=4) / len(first)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.125, 0.125]), rtol=0, atol=0.04)
    assert PROJECTORS["rows"].choose(Choice(matrix, 2)).tolist() == [0, 1]


@pytest.mark.parametrize("name", PROJECTORS)
def test_repeats_are_bit_equal_and_the_gradient_is_left_alone(name):
    matrix = decaying(90, 70, 0.5, torch.float32)
    before, previous = matrix.clone(), torch.linalg.qr(torch.randn(90, 7))[0]
    first, second = (PROJECTORS[name].choose(Choice(matrix, 7, previous, 5)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(matrix, before)


@pytest.mark.parametrize("name", [name for name in PROJECTORS if name != "svd"])
def test_columns_of_several_processes(name):
    """With the sums over both halves, each half chooses what the whole would, whatever its own columns say."""
    whole = decaying(40, 60, 0.7)
    halves = whole[:, :25], whole[:, 25:]
    previous = torch.linalg.qr(torch.randn(40, 5).double())[0]
    recorded = []
    PROJECTORS[name].choose(Choice(halves[1], 5, previous, 2, reduce=lambda tensor: recorded.append(tensor.clone())))
    expected = PROJECTORS[name].choose(Choice(whole, 5, previous, 2))
    if name in DRAWN:
        assert not recorded
        return
    # Sums that depend on earlier sums need these to be complete: add what the other half has to say, in turn.
    for _ in range(len(recorded)):
        others, calls = [], iter(list(recorded))

        def with_recorded(tensor):
            others.append(tensor.clone())
            tensor += next(calls)

        PROJECTORS[name].choose(Choice(halves[0], 5, previous, 2, reduce=with_recorded))
        replies, recorded = iter(others), []

        def with_others(tensor):
            recorded.append(tensor.clone())
            tensor += next(replies)

        found = PROJECTORS[name].choose(Choice(halves[1], 5, previous, 2, reduce=with_others))
    mine, theirs = vectors(name, found, whole), vectors(name, expected, whole)
    torch.testing.assert_close(mine @ mine.T, theirs @ theirs.T, rtol=0, atol=1e-8)


def group_of(**options):
    param = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = pykern.LowRankAdamW([param], rank=5, **options)
    group = optimizer.param_groups[0]
    complete_group(group)
    return Job.of(param, 0, group, {})


@pytest.mark.parametrize("name", ["dct", "rows"])
def test_formats_of_indices(name):
    job = group_of(projector=name)
    basis = basis_of(job.group)
    job.state = basis.init(job)
    assert job.state.keys() == {"projector_indices"} and not basis.dense(job, job.state).any()
    basis.store(job, torch.tensor([3, 0, 15, 7, 1]))
    before, old = {name: value.clone() for name, value in job.state.items()}, basis.dense(job, job.state).clone()
    torch.testing.assert_close(old.T @ old, torch.eye(5), rtol=0, atol=1e-6)
    basis.store(job, torch.tensor([7, 2, 3, 9, 4]))
    rotation = basis.rotation(job, before)
    torch.testing.assert_close(rotation, basis.dense(job, job.state).T @ old, rtol=0, atol=1e-6)
    assert rotation.sum() == 2 and rotation[0, 0] == rotation[3, 3] == 1
    assert job.state["projector_indices"].tolist() == [3, 2, 9, 7, 4]


@pytest.mark.parametrize("name", ["gram", "svd", "randomized"])
def test_both_sides(name):
    """R = P^T G Q, the update P N Q^T; the moments are [rank, rank]."""
    param = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    param.grad = decaying(24, 16, 2.0)
    pykern.LowRankAdamW([param], 0.5, rank=4, side="full", projector=name, scale=1.0, eps=1e-4).step()
    left = reference.leading_vectors(param.grad, 4, right=False)
    right = reference.leading_vectors(param.grad, 4, right=True)
    # In the singular vectors R is diagonal, and Adam's first step makes ones of it.
    expected = -0.5 * left @ (left.T @ param.grad @ right).sign().diag().diag() @ right.T
    torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-2)
    with pytest.raises(ValueError, match='side: "full" keeps vectors'):
        pykern.LowRankAdamW([param], rank=4, side="full", projector="dct")


@pytest.mark.parametrize("name", PROJECTORS)
def test_training_with_every_projector(name):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(24, 16, generator=generator)
    param = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = pykern.LowRankAdamW([param], 0.05, rank=6, refresh_every=3, projector=name)
    for _ in range(100):
        param.grad = param.detach() - target
        optimizer.step()
    assert (param - target).norm() < 0.7 * target.norm()
