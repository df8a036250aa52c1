"""Projectors that pick rows: the ops take their indices, and give what the dense P gives."""

import pytest
import torch

import pykern
from pykern.lowrank import Int8Linear, bases, ops, stepping
from pykern.reference import lowrank_parts as reference
from tests.lowrank.parts import DTYPES, low_rank, matrices, one, wide
from tests.lowrank.test_apply import PARTS, Weights, hold
from tests.support import check_op, poison, threads

SIDES = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
# Ranks and lines above a slab of picked rows, and rests of each.
SHAPES = [(17, 33, 5), (80, 200, 70), (64, 301, 64), (300, 40, 7), (9, 520, 8), (5, 1, 2), (1, 5, 1)]
# Lines above a piece, along either axis; on CUDA, above a block's part of one.
LONG = [(7, 2100, 5), (1100, 40, 7)]


def picked(device="cpu", shapes=SHAPES):
    """Rows in random order, one column in the middle of each list without one."""
    lists = []
    for i, (n, _, rank) in enumerate(shapes):
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(i))[:rank]
        if rank > 1:
            rows[rank // 2] = -1
        lists.append(rows.to(device))
    return lists


def dense(rows, n, dtype):
    basis = torch.zeros(n, len(rows), dtype=dtype)
    for k, row in enumerate(rows.tolist()):
        if row >= 0:
            basis[row, k] = 1
    return basis.to(rows.device)


class PickedWeights(Weights):
    """Weights whose P picks rows; `bases` are dense."""

    def __init__(self, dtype, device="cpu", *, shapes=SHAPES, **options):
        super().__init__(dtype, device, shapes=shapes, **options)
        self.bases = [dense(rows, n, dtype) for rows, (n, _, _) in zip(picked(device, shapes), shapes, strict=True)]
        if self.lists["projector"]:
            self.lists["projector"] = picked(device, shapes)

    def defined(self, i, *arguments, **options):
        given = self.lists["projector"]
        if given:
            self.lists["projector"] = self.bases
        try:
            return super().defined(i, *arguments, **options)
        finally:
            self.lists["projector"] = given


def others(rows, n):
    """Which of n rows are not picked."""
    left = torch.ones(n, dtype=torch.bool, device=rows.device)
    left[rows[rows >= 0]] = False
    return left


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale, maximize, gap", [(1.0, False, 0), (2.0, True, 3)])
def test_projects_what_the_rows_are(device, dtype, right, scale, maximize, gap):
    shapes = SHAPES + LONG
    grads, rows = matrices(dtype, device, right=right, gap=gap, shapes=shapes), picked(device, shapes)
    low = [poison(tensor) for tensor in low_rank(dtype, device, shapes=shapes)]
    exact = []
    for grad, own in zip(grads, rows, strict=True):
        values, basis = grad.to(wide(dtype)).cpu(), dense(own, grad.shape[0], wide(dtype)).cpu()
        exact.append(reference.project(values, basis, scale, maximize)[0])
        grad[others(own, grad.shape[0])] = float("nan")
    ops.low_rank_project(grads, rows, None if scale == 1.0 else one(scale, device), low, [], maximize=maximize)
    for result, expected in zip(low, exact, strict=True):
        assert torch.equal(result.cpu(), expected)


@SIDES
@pytest.mark.parametrize("parts", [name for name, lists in PARTS.items() if "projector" in lists])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_applies_what_the_dense_basis_does(device, dtype, right, parts):
    hold(PickedWeights(dtype, device, right=right, parts=parts))


@SIDES
@pytest.mark.parametrize("parts", ["up", "up and sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_every_instruction_set(cpu_level, dtype, right, parts):
    hold(PickedWeights(dtype, right=right, parts=parts, shapes=SHAPES + LONG), weight_decay=0.0)


@SIDES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_decay(device, dtype, right):
    hold(PickedWeights(dtype, device, right=right, parts="up", gap=3), weight_decay=0.0)


@SIDES
def test_decay_after(device, right):
    hold(PickedWeights(torch.bfloat16, device, right=right, parts="up", shapes=SHAPES[2:5]), decay_after=True)


@SIDES
@pytest.mark.parametrize("rounding", [0, 1, 2])
@pytest.mark.parametrize("parts, weight_decay", [("up", 0.0), ("up", 0.1), ("up and sign", 0.1)])
def test_rounds_as_with_the_dense_basis(device, right, rounding, parts, weight_decay):
    shapes = [SHAPES[0], SHAPES[4]]
    both = [PickedWeights(torch.bfloat16, device, right=right, parts=parts, shapes=shapes) for _ in range(2)]
    both[1].lists["projector"] = both[1].bases
    for weights in both:
        # What the products of bfloat16 take as it is.
        for name in ("direction", "low"):
            weights.lists[name] = [tensor.bfloat16().float() for tensor in weights.lists[name]]
        weights.compensation = [torch.full_like(w, 1e-3) for w in weights.param] if rounding == 2 else []
        weights.apply(rounding=rounding, weight_decay=weight_decay)
    for a, b in zip(both[0].param + both[0].compensation, both[1].param + both[1].compensation, strict=True):
        assert torch.equal(a, b)


def test_the_other_rows_are_not_touched(device):
    weights = PickedWeights(torch.bfloat16, device, parts="up")
    lists = [weights.param, weights.lists["projector"], weights.lists["direction"]]
    for param, rows, direction in zip(*lists, strict=True):
        param[others(rows, param.shape[0])] = -0.0
        direction[rows < 0] = float("nan")
    before = [param.clone() for param in weights.param]
    weights.apply(weight_decay=0.0)
    for old, new, rows in zip(before, *lists[:2], strict=True):
        same = (old.view(torch.int16) == new.view(torch.int16)).all(dim=1)
        assert torch.equal(same, others(rows, new.shape[0])) and new.isfinite().all()


@SIDES
def test_bit_equal_for_any_number_of_threads(right):
    results = []
    for count in (1, 2, 3):
        with threads(count):
            weights = PickedWeights(torch.bfloat16, right=right)
            weights.apply(rounding=1)
        results.append(weights.param)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2)], ids=str)
def test_empty_matrices(device, shape):
    shapes = [shape, (6, 7, 2)]
    weights = PickedWeights(torch.float32, device, shapes=shapes[1:], parts="up")
    rows = [torch.full((2,), -1, device=device), *weights.lists["projector"]]
    low = low_rank(torch.float32, device, shapes=shapes)
    ops.low_rank_project(matrices(torch.float32, device, shapes=shapes), rows, None, low, [], maximize=False)
    assert not low[0].any() and low[1].any()


def test_an_empty_matrix_says_nothing_of_the_next_one(device):
    """A shard may be empty: it has no gradient in memory, others have, and their other rows take its signs."""
    hold(PickedWeights(torch.float32, device, parts="up and sign", shapes=[(5, 0, 2), (6, 7, 2)]), weight_decay=0.0)


@pytest.mark.parametrize(
    "rows, message", [([1, 17], "below 17 or -1, got 17"), ([-2, 1], "got -2"), ([3, 3], "3 twice")]
)
def test_rows_that_are_none_are_refused_before_anything_is_written(rows, message):
    grads = matrices(torch.float32, shapes=[(17, 33, 2)] * 2)
    low = [torch.full((2, 33), 7.0) for _ in grads]
    with pytest.raises(RuntimeError, match=message):
        ops.low_rank_project(grads, [torch.tensor([0, 1]), torch.tensor(rows)], None, low, [], maximize=False)
    weights = PickedWeights(torch.float32, parts="up", shapes=[(17, 33, 2)] * 2)
    weights.lists["projector"][1] = torch.tensor(rows)
    before = weights.param[0].clone()
    with pytest.raises(RuntimeError, match=message):
        weights.apply()
    assert all((matrix == 7).all() for matrix in low) and torch.equal(weights.param[0], before)


def test_refused_arguments(device):
    grads, rows = matrices(torch.float32, device, shapes=[(17, 33, 5)] * 2), torch.tensor([0, 1], device=device)
    low = [torch.empty(2, 33, device=device) for _ in grads]
    squares = [torch.empty(33, device=device) for _ in grads]
    with pytest.raises(RuntimeError, match="squares: expected none"):
        ops.low_rank_project(grads, [rows, rows], None, low, squares, maximize=False)
    with pytest.raises(RuntimeError, match=r"projector\[1\]: expected 1 dim"):
        ops.low_rank_project(grads, [rows, dense(rows, 17, torch.float32)], None, low, [], maximize=False)
    with pytest.raises(RuntimeError, match=r"projector\[0\]: expected int64, got int32"):
        ops.low_rank_project(grads, [rows.int(), rows.int()], None, low, [], maximize=False)
    with pytest.raises(RuntimeError, match=r"low\[0\]"):
        ops.low_rank_project(grads, [rows, rows], None, [matrix[:1] for matrix in low], [], maximize=False)


def test_opcheck(device):
    shapes = SHAPES[:2]
    grads, low = matrices(torch.float32, device, shapes=shapes), low_rank(torch.float32, device, shapes=shapes)
    check_op(ops.low_rank_project, (grads, picked(device, shapes), None, low, []), {"maximize": False})


# --- the optimizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda w: pykern.GrassAdamW(w, 1e-2, rank=5, refresh_every=2),
    lambda w: pykern.LowRankOptimizer(w, 1e-2, rank=5, projector="rows_sampled", weight_decay=0.1, rule="lion"),
    lambda w: pykern.Frugal(w, 1e-2, rank=5, refresh_every=2, projector="coordinates"),
    lambda w: pykern.LowRankOptimizer(w, 1e-2, rank=5, projector="rows", feedback_share=1.0, residual="error_feedback"),
])  # fmt: skip
def test_steps_have_no_dense_basis_and_the_same_weights(device, monkeypatch, make):
    def train(rows):
        weights = [torch.nn.Parameter(matrix) for matrix in matrices(torch.float64, device, shapes=[(40, 70, 5)] * 2)]
        weights[1] = torch.nn.Parameter(weights[1].detach().mT.contiguous())
        optimizer = make(weights)
        with monkeypatch.context() as patch:
            if rows:
                patch.setattr(bases, "dense_bases", None)
                patch.setattr(stepping, "dense_bases", None)
            else:
                patch.setattr(stepping, "picks_rows", lambda job: False)
            for i in range(4):
                for j, weight in enumerate(weights):
                    weight.grad = matrices(torch.float64, device, seed=10 * i + j, shapes=[weight.shape + (5,)])[0]
                optimizer.step()
        return weights

    for a, b in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("right", [False, True])
def test_without_a_basis_nothing_changes(device, right):
    weight = torch.nn.Parameter(torch.randn(40, 70)[:, : 30 if right else 70].clone().to(device))
    before = weight.detach().clone()
    optimizer = pykern.GrassAdamW([weight], 1e-2, rank=5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before) and (optimizer.state[weight]["projector_indices"] == -1).all()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert not torch.equal(weight, before)


def largest_rows(grad, rank, right):
    """What the projector "rows" picks, as a matrix."""
    norms = grad.norm(dim=0 if right else 1)
    return dense(norms.sort(descending=True, stable=True).indices[:rank], len(norms), grad.dtype)


@pytest.mark.parametrize("residual", ["fira", "apollo_channel", "none"])
def test_what_takes_more_than_rows_has_a_dense_basis(device, residual):
    """Fira, APOLLO, and for "none" weights in 8 bits."""
    layers = []
    for projector in ("rows", largest_rows):
        torch.manual_seed(0)
        layer = torch.nn.Linear(70, 40, bias=False).to(device)
        if residual == "none":
            layer = Int8Linear.from_linear(layer)
        optimizer = pykern.LowRankOptimizer(layer.parameters(), 1e-2, rank=5, projector=projector, residual=residual)
        for i in range(3):
            layer.weight.grad = matrices(torch.float32, device, seed=i, shapes=[(40, 70, 5)])[0]
            optimizer.step()
        layers.append(layer)
    states = [list(layer.state_dict().values()) for layer in layers]
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_projected_gradients_step_as_gradients_do(device):
    weights = [torch.nn.Parameter(matrices(torch.bfloat16, device, shapes=[(40, 70, 5)])[0]) for _ in range(2)]
    optimizers = [pykern.GrassAdamW([weight], 1e-2, rank=5, maximize=True) for weight in weights]
    for i in range(2):
        for weight in weights:
            weight.grad = matrices(torch.bfloat16, device, seed=i, shapes=[(40, 70, 5)])[0]
        if i == 0:
            optimizers[0].step()
        else:
            low = optimizers[0].project(weights[0])
            assert torch.equal(low, -weights[0].grad[optimizers[0].state[weights[0]]["projector_indices"]].float())
            optimizers[0].step_projected({weights[0]: low})
        optimizers[1].step()
    assert torch.equal(*weights)
