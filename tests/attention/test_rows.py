"""gather_rows: values, gradients summed in one order, strides, rows outside."""

import pytest
import torch

import pykern
from pykern import gather_rows
from pykern.attention.rows import invert_rows
from pykern.attention.tiles import tree_tiles
from tests.support import check_op, compile_whole, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

_gather = torch.ops.pykern.gather_rows.default
_backward = torch.ops.pykern.gather_rows_backward.default


def summed(grad_out: torch.Tensor, rows: torch.Tensor, source_rows: int) -> torch.Tensor:
    """The gradient's meaning: float32 sums (float64 for float64) in ascending n, rounded once."""
    wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    sums = torch.zeros(source_rows, grad_out.shape[1], dtype=wide)
    for n, row in enumerate(rows.tolist()):
        sums[row] += grad_out[n].to(wide)
    return sums.to(grad_out.dtype)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randint(limit: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, limit, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 33, 64, 130, 1028])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(device, dtype, columns):
    source = randn(11, columns, dtype=dtype).to(device).requires_grad_()
    rows = torch.tensor([3, 3, 0, 10, 3, 7, 7, 3, 1]).to(device)
    grad_out = randn(9, columns, dtype=dtype, seed=1).to(device)
    out = gather_rows(source, rows)
    assert torch.equal(out, source[rows])
    out.backward(grad_out)
    assert torch.equal(source.grad.cpu(), summed(grad_out.cpu(), rows.cpu(), 11))


@pytest.mark.parametrize(("source_rows", "count"), [(1, 300), (300, 1), (70, 530), (600, 40)])
def test_many_rows_and_many_uses(device, source_rows, count):
    source = randn(source_rows, 24, dtype=torch.bfloat16).to(device).requires_grad_()
    rows = randint(source_rows, count).to(device)
    grad_out = randn(count, 24, dtype=torch.bfloat16, seed=1).to(device)
    for inverse in ({}, dict(zip(("order", "offsets"), invert_rows(rows, source_rows), strict=True))):
        out = gather_rows(source, rows, **inverse)
        assert torch.equal(out, source[rows])
        (grad,) = torch.autograd.grad(out, source, grad_out)
        assert torch.equal(grad.cpu(), summed(grad_out.cpu(), rows.cpu(), source_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [0, 1, 2, 4])
def test_any_strides_and_alignments(device, dtype, lead):
    """Rows of a wider matrix that begin anywhere in it; columns apart; one row expanded; neighbours poisoned."""
    rows = torch.tensor([2, 0, 2, 5, 2]).to(device)
    plain = randn(6, 16, dtype=dtype).to(device)
    wide = torch.full((6, 40), float("nan"), dtype=dtype, device=device)
    wide[:, lead : lead + 16] = plain
    columns_apart = torch.full((6, 32), float("nan"), dtype=dtype, device=device)
    columns_apart[:, ::2] = plain
    views = [wide[:, lead : lead + 16], columns_apart[:, ::2], plain.t().contiguous().t()]
    for view in views:
        assert torch.equal(gather_rows(view, rows), plain[rows])
    assert torch.equal(gather_rows(plain[:1].expand(6, 16), rows), plain[:1].expand(5, 16))
    assert torch.equal(gather_rows(plain, rows.repeat_interleave(2)[::2]), plain[rows])
    for grad_out in [view[:5] for view in views] + [plain[:1].expand(5, 16)]:
        source = plain.clone().requires_grad_()
        gather_rows(source, rows).backward(grad_out)
        assert torch.equal(source.grad.cpu(), summed(grad_out.cpu(), rows.cpu(), 6))


@pytest.mark.parametrize(("source_rows", "columns", "count"), [(5, 3, 0), (0, 3, 0), (5, 0, 4), (0, 0, 0)])
def test_nothing_to_gather(device, source_rows, columns, count):
    source = torch.ones(source_rows, columns, device=device, requires_grad=True)
    rows = torch.zeros(count, dtype=torch.int64, device=device)
    out = gather_rows(source, rows)
    assert out.shape == (count, columns)
    out.sum().backward()
    assert torch.equal(source.grad, torch.zeros_like(source))


def test_non_finite_values_stay_in_their_rows(device):
    source = randn(4, 9, dtype=torch.float32)
    source[1], source[2, 3] = float("nan"), float("inf")
    source = source.to(device).requires_grad_()
    rows = torch.tensor([0, 2, 3, 0]).to(device)
    out = gather_rows(source, rows)
    assert torch.equal(out, source[rows])
    grad_out = torch.ones_like(out)
    grad_out[1] = float("nan")
    out.backward(grad_out)
    assert source.grad.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert source.grad[[0, 1, 3], 0].tolist() == [2, 0, 1]


@pytest.mark.parametrize("merge", [False, True])
def test_packed_batch_gathers_its_predictor_rows(device, merge):
    batch = pykern.pack([[1, 2, 3], [4], [1, 2]], [[[5, 6], [7], []], [[8, 8]], []], merge=merge).to(device)
    order, offsets = batch.predictor_order.tolist(), batch.predictor_offsets.tolist()
    assert len(offsets) == batch.tree.num_tokens + 1
    for row, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        assert order[begin:end] == torch.nonzero(batch.predictor_rows == row)[:, 0].tolist()
    hidden = randn(batch.tree.num_tokens, 20, dtype=torch.bfloat16).to(device).requires_grad_()
    out = batch.gather(hidden)
    assert torch.equal(out, hidden[batch.predictor_rows])
    grad_out = randn(*out.shape, dtype=torch.bfloat16, seed=1).to(device)
    out.backward(grad_out)
    assert torch.equal(hidden.grad.cpu(), summed(grad_out.cpu(), batch.predictor_rows.cpu(), len(hidden)))


def test_packing_nothing():
    batch = pykern.pack([], [])
    assert batch.gather(torch.zeros(0, 4)).shape == (0, 4)
    assert batch.predictor_offsets.tolist() == [0]


def test_gradcheck(device):
    source = randn(5, 3, dtype=torch.float64).to(device).requires_grad_()
    rows = torch.tensor([4, 0, 4, 2]).to(device)
    assert torch.autograd.gradcheck(lambda source: gather_rows(source, rows), source)


def test_repeats_bit_for_bit_with_any_number_of_threads(cpu_level):
    source = randn(50, 700, dtype=torch.float16).requires_grad_()
    rows = randint(50, 900)
    grad_out = randn(900, 700, dtype=torch.float16, seed=1)
    want = summed(grad_out, rows, 50)
    for count in (1, 2, 5):
        with threads(count):
            (grad,) = torch.autograd.grad(gather_rows(source, rows), source, grad_out)
        assert torch.equal(grad, want)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_host():
    batch = pykern.pack([[1] * 40], [[[2] * 300, [3] * 500]]).to("cuda")
    hidden = randn(batch.tree.num_tokens, 64, dtype=torch.bfloat16).cuda().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tree_tiles(batch.tree.subtree_end, batch.tree.position)
        batch.gather(hidden).sum().backward()
        gather_rows(hidden, batch.predictor_rows).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bad", [-1, 6, 2**62, -(2**63)])
def test_rows_outside(device, bad):
    """An error where the values are on the host; on a GPU NaN rows, and no access outside."""
    source = randn(6, 12, dtype=torch.bfloat16).to(device).requires_grad_()
    rows = torch.tensor([1, bad, 5]).to(device)
    if rows.is_cpu:
        with pytest.raises(ValueError, match=f"rows: expected values from 0 to 5, got {bad}"):
            gather_rows(source, rows)
        try:
            out = _gather(source.detach(), rows)
        except RuntimeError as error:  # the CPU op's own check
            assert "rows: expected values from 0 to 5" in str(error)
            return
    else:
        out = gather_rows(source, rows)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], source[[1, 5]])
    grad = _backward(torch.ones_like(out), *invert_rows(rows, 6))
    assert grad[:, 0].tolist() == [0, 1, 0, 0, 0, 1]


def test_wrong_inverse_reaches_nothing_outside(device):
    """order and offsets are the caller's; whatever they hold, no byte outside is touched."""
    grad_out = torch.ones(3, 8, device=device)
    order = torch.tensor([0, 99, -5]).to(device)
    offsets = torch.tensor([-7, 1, 3, 80, 2]).to(device)
    try:
        grad = _backward(grad_out, order, offsets)
    except RuntimeError as error:
        assert "order: expected values from 0 to 2, got 99" in str(error)
        return
    assert grad[:, 0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(device, dtype):
    source = randn(6, 5, dtype=dtype).to(device)
    rows = torch.tensor([1, 5, 1]).to(device)
    check_op(_gather, (source, rows))
    check_op(_gather, (randn(6, 9, dtype=dtype).to(device)[:, :5], rows))
    check_op(_backward, (source[:3], *invert_rows(rows, 6)))


@pytest.mark.parametrize("with_inverse", [False, True])
def test_compiles_whole(device, with_inverse):
    source = randn(6, 5, dtype=torch.float32).to(device).requires_grad_()
    rows = torch.tensor([1, 5, 1]).to(device)
    inverse = dict(zip(("order", "offsets"), invert_rows(rows, 6), strict=True)) if with_inverse else {}

    def function(source, rows, inverse):
        return gather_rows(source * 2, rows, **inverse).cos().sum()

    (want,) = torch.autograd.grad(function(source, rows, inverse), source)
    (got,) = torch.autograd.grad(compile_whole(function)(source, rows, inverse), source)
    assert torch.equal(got, want)


ROWS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (([1.0], ROWS), {}, TypeError, "source: expected a tensor, got list"),
        ((torch.zeros(3, 4, dtype=torch.int64), ROWS), {}, TypeError, "source: expected float32, bfloat16"),
        ((torch.zeros(3), ROWS), {}, ValueError, r"source: expected \[rows, columns\], got shape \(3,\)"),
        ((torch.zeros(3, 4), ROWS.int()), {}, TypeError, "rows: expected an int64 tensor, got torch.int32"),
        ((torch.zeros(3, 4), ROWS[None]), {}, ValueError, "rows: expected one dimension"),
        ((torch.zeros(3, 4), ROWS.to("meta")), {}, ValueError, "rows: expected source's device cpu, got meta"),
        ((torch.zeros(3, 4), ROWS), {"order": ROWS}, ValueError, "order, offsets: expected both or none"),
        ((torch.zeros(3, 4), ROWS), {"order": ROWS, "offsets": ROWS}, ValueError, "offsets: expected 4 values, got 2"),
        ((torch.zeros(3, 4), ROWS), {"order": ROWS[:1], "offsets": ROWS}, ValueError, "order: expected 2 values"),
    ],
)
def test_refused(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        gather_rows(*arguments, **keywords)
