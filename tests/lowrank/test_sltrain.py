"""SLTrain's layer: the low-rank product plus sparse rows, block by block."""

import copy

import pytest
import torch

import pykern
from pykern.lowrank import sltrain
from pykern.lowrank.sltrain import random_support
from pykern.lowrank.sparse_ops import sparse_rows_add, sparse_rows_take
from pykern.reference.lowrank_weights import sltrain_weight
from tests.support import assert_accurate, assert_grads, check_op, compile_whole, poison, threads

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parts(rows, columns, rank, density=0.2, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    row_start, column = random_support(rows, columns, density, seed)
    up, down, values = normal(rows, rank), normal(rank, columns), normal(column.numel())
    return up, down, values, row_start.to(device), column.to(device)


@pytest.fixture(params=[1 << 22, 300], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(sltrain, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows, columns, rank, tokens", [(45, 70, 4, 9), (70, 33, 7, 1), (1, 1, 1, 3)])
def test_forward_and_backward_are_those_of_the_whole_weight(device, blocks, dtype, rows, columns, rank, tokens):
    up, down, values, row_start, column = parts(rows, columns, rank, dtype=dtype, device=device)
    x, bias = torch.randn(tokens, columns).to(dtype).to(device), torch.randn(rows).to(dtype).to(device)
    weights = torch.randn(tokens, rows).to(dtype)

    def run(function, kind, where):
        leaves = [tensor.detach().to(where).to(kind).requires_grad_() for tensor in (x, up, down, values, bias)]
        out = function(*leaves)
        out.backward(weights.to(where).to(kind))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    def ours(x, up, down, values, bias):
        return pykern.sltrain_linear(x, up, down, values, row_start, column, bias, scale=1.5)

    def plain(x, up, down, values, bias):
        weight = sltrain_weight(up, down, values, row_start.cpu(), column.cpu(), 1.5)
        return x @ weight.mT + bias

    for got, exact, baseline in zip(
        run(ours, dtype, device), run(plain, torch.float64, "cpu"), run(plain, dtype, "cpu"), strict=True
    ):
        assert_accurate(got, exact, baseline, units=8.0)


def test_gradients_by_differences(blocks):
    up, down, values, row_start, column = parts(40, 11, 3, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (torch.randn(5, 11, dtype=torch.float64), up, down, values)]
    assert torch.autograd.gradcheck(lambda *t: pykern.sltrain_linear(*t, row_start, column, scale=0.7), leaves)


@pytest.mark.parametrize("shape", [(0, 8), (2, 3, 8), (8,)], ids=str)
def test_any_number_of_axes_and_none_of_rows(device, shape):
    layer = pykern.SLTrainLinear(8, 6, 2, 0.3, bias=True).to(device)
    out = layer(torch.randn(shape, device=device))
    assert out.shape == (*shape[:-1], 6)
    out.sum().backward()
    assert_grads(dict(layer.named_parameters()))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_entries_and_all_entries(device, density):
    layer = pykern.SLTrainLinear(9, 5, 2, density).to(device)
    with torch.no_grad():
        layer.up.normal_()
    weight = sltrain_weight(layer.up, layer.down, layer.values, layer.row_start, layer.column, layer.scale)
    x = torch.randn(4, 9, device=device)
    torch.testing.assert_close(layer(x), x @ weight.mT)
    assert layer.values.numel() == (45 if density else 0)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_meet_a_block_anywhere(device, dtype):
    _, _, values, row_start, column = parts(13, 50, 1, dtype=dtype, device=device)
    dense = sltrain_weight(
        torch.zeros(13, 1).double(),
        torch.zeros(1, 50).double(),
        values.cpu().double(),
        row_start.cpu(),
        column.cpu(),
        1.0,
    )
    whole = poison(torch.empty(8, 40, dtype=dtype, device=device))
    block = whole[1:7, 3:20].fill_(0.5)
    sparse_rows_add(block, values, row_start, column, first_row=4, first_column=11)
    assert torch.equal(block.cpu(), (dense[4:10, 11:28] + 0.5).to(dtype))
    assert whole.isnan().sum() == whole.numel() - block.numel()

    taken = torch.full_like(values, 7.0)
    sparse_rows_take(block, row_start, column, taken, first_row=4, first_column=11)
    rows = torch.repeat_interleave(torch.arange(13), row_start.cpu().diff())
    inside = (rows >= 4) & (rows < 10) & (column.cpu() >= 11) & (column.cpu() < 28)
    assert inside.any() and not inside.all()
    assert torch.equal(taken.cpu()[inside], block.cpu()[rows[inside] - 4, column.cpu()[inside].long() - 11])
    assert (taken.cpu()[~inside] == 7).all()


def test_opcheck(device):
    _, _, values, row_start, column = parts(6, 9, 1, device=device)
    place = {"first_row": 1, "first_column": 2}
    check_op(sparse_rows_add, (torch.zeros(4, 5, device=device), values, row_start, column), place)
    check_op(sparse_rows_take, (torch.zeros(4, 5, device=device), row_start, column, values.clone()), place)


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, torch.zeros(3), "block: expected 2 dimensions"),
        (0, torch.zeros(9, 6).t(), "block: expected unit stride"),
        (0, torch.zeros(7, 9), "first_row: expected the block's rows"),
        (1, torch.zeros(5, dtype=torch.float64), "values: expected [a-z0-9]+, got [a-z0-9]+"),
        (2, torch.zeros(7, dtype=torch.int32), "row_start: expected [a-z0-9]+, got [a-z0-9]+"),
        (3, torch.zeros(2, dtype=torch.int32), "column: expected size"),
    ],
)
def test_ops_refuse(device, index, value, message):
    _, _, values, row_start, column = parts(6, 9, 1, device=device)
    arguments = [torch.zeros(6, 9, device=device), values, row_start, column]
    arguments[index] = value.to(device)
    with pytest.raises(RuntimeError, match=message):
        sparse_rows_add(*arguments, first_row=0, first_column=0)


def test_repeats_bit_for_bit(device, blocks):
    layer, results = pykern.SLTrainLinear(64, 90, 5).to(device), []
    x = torch.randn(33, 64, device=device)
    for _ in range(3):
        layer.zero_grad()
        layer(x).square().sum().backward()
        results.append([param.grad.clone() for param in layer.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sparse_rows_are_the_same_for_any_number_of_threads():
    _, _, values, row_start, column = parts(90, 64, 1)
    results = []
    for count in (1, 2, 3):
        block = torch.ones(90, 64)
        with threads(count):
            sparse_rows_add(block, values, row_start, column, first_row=0, first_column=0)
        results.append(block)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_support_is_even_and_repeats():
    row_start, column = random_support(40, 100, 0.031, seed=3)
    assert row_start[-1] == column.numel() == round(0.031 * 4000)
    assert set(row_start.diff().tolist()) <= {3, 4}
    for row in range(40):
        places = column[row_start[row] : row_start[row + 1]]
        assert (places.diff() > 0).all() and places.min() >= 0 and places.max() < 100
    again = random_support(40, 100, 0.031, seed=3)
    assert torch.equal(again[0], row_start) and torch.equal(again[1], column)
    assert not torch.equal(random_support(40, 100, 0.031, seed=4)[1], column)


def test_from_linear_keeps_what_fits():
    linear = torch.nn.Linear(30, 20)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(20, 4) @ torch.randn(4, 30))
    layer = pykern.SLTrainLinear.from_linear(linear, rank=20, density=0.1, alpha=3.0)
    torch.testing.assert_close(layer.dense_weight(), linear.weight.detach(), rtol=1e-4, atol=1e-5)
    x = torch.randn(7, 30)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-4)


def test_state_dict_and_copies():
    layer, other = pykern.SLTrainLinear(30, 20, 4, seed=1), pykern.SLTrainLinear(30, 20, 4, seed=2)
    assert not torch.equal(layer.column, other.column)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 30)
    assert torch.equal(layer(x), other(x)) and torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_training_lowers_the_loss_in_autocast_too():
    layer = pykern.SLTrainLinear(16, 12, 3, 0.2)
    optimizer = torch.optim.AdamW(layer.parameters(), 3e-2)
    x, target = torch.randn(64, 16), torch.randn(64, 12)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        losses.append((out.float() - target).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_nothing_of_the_weights_size_is_saved(monkeypatch):
    monkeypatch.setattr(sltrain, "BLOCK_ELEMENTS", 64 * 512)
    layer, saved = pykern.SLTrainLinear(512, 1024, 4, 0.01), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(8, 512))
    assert saved and max(tensor.numel() for tensor in saved) < 512 * 1024 / 16


def test_compiles_whole():
    layer = pykern.SLTrainLinear(16, 12, 3)
    x = torch.randn(5, 16)
    torch.testing.assert_close(compile_whole(layer)(x), layer(x))


@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0)])
def test_no_features(device, rows, columns):
    up, down, values, row_start, column = parts(rows, columns, 2, device=device)
    x, up = torch.randn(3, columns, device=device, requires_grad=True), up.requires_grad_()
    out = pykern.sltrain_linear(x, up, down, values, row_start, column)
    out.sum().backward()
    assert out.shape == (3, rows) and not out.any()
    assert x.grad.shape == x.shape and up.grad.shape == up.shape and not up.grad.any()


def test_from_linear_in_double():
    linear = torch.nn.Linear(9, 7, dtype=torch.float64)
    layer = pykern.SLTrainLinear.from_linear(linear, rank=7, density=0.1)
    torch.testing.assert_close(layer.dense_weight(), linear.weight.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"up": torch.zeros(6, 2, dtype=torch.float64)}, TypeError, "up: expected torch.float32"),
        ({"bias": torch.zeros(6, dtype=torch.float64)}, TypeError, "bias: expected torch.float32"),
        ({"down": torch.zeros(3, 9)}, ValueError, "down: expected"),
        ({"x": torch.zeros(4, 8)}, ValueError, "x: expected last size 9"),
        ({"row_start": torch.zeros(6, dtype=torch.int64)}, ValueError, "row_start: expected int64"),
        ({"column": torch.zeros(1, dtype=torch.int32)}, ValueError, "column: expected int32"),
    ],
)
def test_refusals(change, error, message):
    names = ("up", "down", "values", "row_start", "column")
    arguments = {"x": torch.zeros(4, 9), **dict(zip(names, parts(6, 9, 2), strict=True)), **change}
    with pytest.raises(error, match=message):
        pykern.sltrain_linear(**arguments)


@pytest.mark.parametrize(
    "keywords, message",
    [({"rank": 0}, "rank: expected"), ({"density": 1.5}, "density: expected"), ({"alpha": 0.0}, "alpha: expected")],
)
def test_layer_refuses(keywords, message):
    with pytest.raises(ValueError, match=message):
        pykern.SLTrainLinear(4, 4, **{"rank": 1, **keywords})


def test_a_layer_lies_where_its_weights_do():
    with torch.device("meta"):
        layer, elsewhere = pykern.SLTrainLinear(8, 6, 2, 0.1, device="cpu"), pykern.SLTrainLinear(8, 6, 2, 0.1)
    assert torch.equal(layer.column, pykern.SLTrainLinear(8, 6, 2, 0.1).column)
    assert {value.device.type for value in elsewhere.state_dict().values()} == {"meta"}
