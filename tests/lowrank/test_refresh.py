"""When a subspace is chosen anew, and what becomes of the moments."""

import io
from collections import Counter

import pytest
import torch

import pykern
from pykern.lowrank import projectors, stepping
from pykern.lowrank.refresh import MOMENTS
from pykern.reference.lowrank import dequantize
from tests.support import threads


@pytest.fixture(autouse=True)
def one_thread():
    """These matrices are too small to share, and a busy machine makes threads wait for each other."""
    with threads(1):
        yield


def parameters(*shapes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def run(optimizer, params, steps, first=0, grads=None):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) if grads is None else grads[step]
        optimizer.step()


@pytest.fixture
def chosen(monkeypatch):
    """The parameters' places and the projectors of every choice, in order."""
    choices = []

    def recorded(name, row):
        def choose(choice):
            choices.append((choice.index, name))
            return row.choose(choice)

        return projectors.Projector(choose, row.orthonormal, row.basis, row.first)

    for name, row in list(projectors.PROJECTORS.items()):
        monkeypatch.setitem(projectors.PROJECTORS, name, recorded(name, row))
    return choices


@pytest.mark.parametrize("refresh, steps", [("every", [0, 4, 8]), ("online", list(range(10)))])
def test_steps_of_the_refreshes(chosen, refresh, steps):
    params = parameters((8, 6))
    optimizer = pykern.LowRankAdamW(params, 0.01, rank=2, refresh_every=4, refresh=refresh)
    found = []
    for step in range(10):
        before = len(chosen)
        run(optimizer, params, 1, step)
        found += [step] * (len(chosen) - before)
    assert found == steps
    assert int(optimizer.state[params[0]]["refreshes"]) == len(steps)


@pytest.mark.parametrize("count, gap", [(6, 3), (5, 8), (7, 3), (3, 1)])
def test_staggered_refreshes_are_spread_evenly(chosen, count, gap):
    params = parameters(*[(8, 6)] * count, (5,))
    optimizer = pykern.LowRankAdamW(params, 0.01, rank=2, refresh_every=gap, refresh="staggered")
    per_step = []
    for step in range(3 * gap + 1):
        chosen.clear()
        run(optimizer, params, 1, step)
        per_step.append(Counter(chosen))
    # All need a basis at once in the first step, so it is a cheaper one.
    assert per_step[0] == {(index, "randomized"): 1 for index in range(count)}
    for first in (1, gap + 1, 2 * gap + 1):
        one_round = per_step[first : first + gap]
        assert sum(one_round, Counter()) == {(index, "gram"): 1 for index in range(count)}
        assert {step.total() for step in one_round} <= {count // gap, -(-count // gap)}


def test_staggered_refreshes_weigh_matrices_by_their_work(chosen):
    """Half of the work is in the last matrix: all others have their turns in the first half."""
    params = parameters(*[(16, 16)] * 4, (32, 32))
    params[4] = torch.nn.Parameter(torch.zeros(16, 64))
    optimizer = pykern.LowRankAdamW(params, 0.01, rank=2, refresh_every=8, refresh="staggered")
    run(optimizer, params, 1)
    assert [int(optimizer.state[param]["next_refresh"]) for param in params] == [1, 2, 3, 4, 5]


def turned_by(degrees, length=9):
    """A gradient whose leading left vector is turned from the first axis towards the second."""
    angle = torch.tensor(degrees).double().deg2rad()
    vector = torch.zeros(6, dtype=torch.float64)
    vector[0], vector[1] = angle.cos(), angle.sin()
    return torch.outer(vector, torch.ones(length, dtype=torch.float64))


def test_lazy_refreshes_double_the_gap_while_the_subspace_stays():
    params = parameters((6, 9), dtype=torch.float64)
    optimizer = pykern.LowRankAdamW(params, 0.01, rank=1, refresh_every=2, refresh="lazy", side="left")
    state = None
    # Five cosines of cos 60 degrees = 0.5 fill the queue at the sixth refresh; the gap doubles there and at the
    # next one. Then turns by a right angle: 4 and 3 of 5 cosines still make a mean of 0.4 and 0.3.
    angles, step, gaps = [0.0], 0, []
    for refresh in range(10):
        angle = angles[-1] + (60.0 if refresh < 7 else 90.0)
        grad = turned_by(angles[-1])
        due = 0 if state is None else int(state["next_refresh"])
        while step <= due:
            run(optimizer, params, 1, step, {step: grad})
            step += 1
        state = optimizer.state[params[0]]
        gaps.append(int(state["refresh_gap"]))
        angles.append(angle)
    assert gaps == [2, 2, 2, 2, 2, 4, 8, 16, 32, 32]
    torch.testing.assert_close(state["refresh_similarity"], torch.tensor([0.5, 0.5, 0.5, 0.0, 0.0]), rtol=0, atol=1e-6)
    assert int(state["next_refresh"]) % 32 == 0 and int(state["refreshes"]) == 10


def test_a_lazy_gap_survives_a_checkpoint():
    params = parameters((6, 9))
    options = {"rank": 2, "refresh_every": 1, "refresh": "lazy", "projector": "dct"}
    optimizer = pykern.LowRankAdamW(params, 0.01, **options)
    same = {step: turned_by(10.0).float() for step in range(20)}
    run(optimizer, params, 9, grads=same)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = [torch.nn.Parameter(params[0].detach().clone())]
    loaded = pykern.LowRankAdamW(other, 0.01, **options)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert int(loaded.state[other[0]]["refresh_gap"]) > 1
    run(optimizer, params, 9, 9, same)
    run(loaded, other, 9, 9, same)
    assert torch.equal(params[0], other[0])
    for name, value in optimizer.state[params[0]].items():
        assert torch.equal(value, loaded.state[other[0]][name])
    # Of the basis nothing but indices.
    assert "projector" not in loaded.state[other[0]]


def moments_after(moments, state_dtype="float32", side="left", projector="gram", dtype=torch.float32, steps=3):
    """(state before, state after) a refresh in the step `steps`, with the gradient of that step zero."""
    params = parameters((12, 300), dtype=dtype)
    grads = {step: torch.randn(12, 300).to(dtype) for step in range(steps + 1)}
    optimizer = pykern.LowRankAdamW(
        params, 0.01, rank=4, refresh_every=steps, moments=moments, state_dtype=state_dtype, side=side,
        projector=projector, betas=(0.9, 0.99),
    )  # fmt: skip
    run(optimizer, params, steps, grads=grads)
    before = {name: value.clone() for name, value in optimizer.state[params[0]].items()}
    # Only what the refresh does, not the step after it.
    refreshed = {}

    def record(job, old, rule=MOMENTS[moments]):
        rule(job, old)
        refreshed.update({name: value.clone() for name, value in job.state.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MOMENTS, moments, record)
        run(optimizer, params, 1, steps, grads)
    return before, refreshed


def read(state, name):
    if state[name].dtype == torch.uint8:
        return dequantize(state[name], state[f"{name}_scale"], name == "exp_avg").double()
    return state[name].double()


TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "8bit": 3e-2}


@pytest.mark.parametrize("side", ["left", "full"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("moments", ["rotate", "rotate_variance"])
def test_rotation_is_the_definition(moments, state_dtype, side):
    before, after = moments_after(moments, state_dtype, side)
    turn = after["projector"].double().T @ before["projector"].double()
    other = torch.eye(before["exp_avg"].shape[1]).double()
    if side == "full":
        other = before["other_projector"].double().T @ after["other_projector"].double()
    m, v = read(before, "exp_avg"), read(before, "exp_avg_sq")
    first = turn @ m @ other
    if moments == "rotate":
        second = (turn @ v @ other).abs()
    else:
        step = int(before["step"])
        c1, c2 = 1 - 0.9**step, 1 - 0.99**step
        variance = turn.square() @ (v / c2 - (m / c1).square()) @ other.square()
        second = c2 * (variance + (first / c1).square()).abs()
    for name, expected in (("exp_avg", first), ("exp_avg_sq", second)):
        found = read(after, name)
        assert (found - expected).abs().max() <= TOLERANCE[state_dtype] * expected.abs().max()
    assert torch.equal(after["step"], before["step"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_of_indices_is_exact(dtype):
    """What stays in the basis keeps its moments to the bit, what is new begins with none."""
    before, after = moments_after("rotate", projector="dct", dtype=dtype)
    old, new = before["projector_indices"].tolist(), after["projector_indices"].tolist()
    assert 0 < len(set(old) & set(new)) < 4
    for row, index in enumerate(new):
        for name in ("exp_avg", "exp_avg_sq"):
            expected = before[name][old.index(index)] if index in old else torch.zeros(300)
            assert torch.equal(after[name][row], expected)


@pytest.mark.parametrize("projector", ["rows", "coordinates"])
def test_kept_moments_stay_with_their_vector(projector):
    """Whatever the order is in which indices are chosen, one that is chosen again finds its moments."""
    before, after = moments_after("keep", projector=projector)
    old, new = before["projector_indices"].tolist(), after["projector_indices"].tolist()
    stayed = [place for place, index in enumerate(new) if index in old]
    assert 0 < len(stayed) < 4 and len(set(new)) == 4
    assert all(old[place] == new[place] for place in stayed)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("moments", ["rotate", "rotate_variance"])
def test_a_basis_that_stays_keeps_its_moments(moments):
    params, basis = parameters((12, 40)), torch.linalg.qr(torch.randn(12, 4))[0]
    results = []
    for rule in (moments, "keep"):
        params = parameters((12, 40))
        optimizer = pykern.LowRankAdamW(
            params, 0.01, rank=4, side="left", refresh_every=1, moments=rule, projector=basis
        )
        run(optimizer, params, 5)
        results.append(params[0].detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_reset_begins_anew_with_draws_of_its_own():
    params = parameters((12, 40))
    optimizer = pykern.LowRankAdamW(
        params, 0.01, rank=4, side="left", refresh_every=3, moments="reset", projector="random_orthonormal"
    )
    bases = []
    for step in range(9):
        run(optimizer, params, 1, step)
        state = optimizer.state[params[0]]
        assert int(state["step"]) == step % 3 + 1
        bases.append(state["projector"].clone())
    for refresh in (3, 6):
        assert not torch.equal(bases[refresh - 1], bases[refresh])
        assert torch.equal(bases[refresh], bases[refresh + 2])
    assert not torch.equal(bases[0], bases[3]) and not torch.equal(bases[3], bases[6])


def test_steps_counted_anew_are_rounded_with_other_bits(monkeypatch):
    params = parameters((12, 40), dtype=torch.bfloat16)
    optimizer = pykern.LowRankAdamW(params, 0.01, rank=4, refresh_every=3, moments="reset", rounding="stochastic")
    drawn, apply = [], stepping.ops.low_rank_apply

    def noting(*arguments, **options):
        steps, seeds = arguments[7:9]
        drawn.append((int(steps[0]), seeds[0]))
        return apply(*arguments, **options)

    monkeypatch.setattr(stepping.ops, "low_rank_apply", noting)
    run(optimizer, params, 7)
    assert [step for step, _ in drawn] == [1, 2, 3, 1, 2, 3, 1] and len(set(drawn)) == 7


@pytest.mark.parametrize("refresh", ["every", "staggered", "lazy", "online"])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("rule", ["adamw", "lion", "momentum", "adabelief"])
def test_rules_with_every_refresh_stay_finite_and_repeat_bit_for_bit(refresh, moments, rule):
    results = []
    for _ in range(2):
        params = parameters((12, 10), (9, 16))
        optimizer = pykern.LowRankOptimizer(
            params, 0.01, rank=3, rule=rule, refresh_every=2, refresh=refresh, moments=moments
        )
        run(optimizer, params, 6)
        results.append(torch.cat([param.detach().flatten() for param in params]))
    assert results[0].isfinite().all() and torch.equal(*results)
