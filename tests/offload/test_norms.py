"""rms_norm and layer_norm against the float64 reference, beside PyTorch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import pykern
from pykern.reference import offload_recompute as reference
from tests.support import assert_accurate, assert_grads, check_op, compile_whole, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the borders of a pack, of a warp's rows and of a block's; 6400 columns have their sums in global memory.
SHAPES = [(1, 1), (3, 7), (9, 8), (17, 33), (5, 1024), (5, 1032), (2, 3, 130), (4, 2056), (2, 12800)]
KINDS = {"rms": False, "layer": True}


def call(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if kind == "rms":
        return pykern.rms_norm(x, weight)
    return pykern.layer_norm(x, weight, bias)


def torch_call(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if kind == "rms":
        return functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
    return functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def meant(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return reference.norm(x, weight, bias if kind == "layer" else None, 1e-6 if kind == "rms" else 1e-5, KINDS[kind])


def drawn(shape: tuple[int, ...], kind: str, affine: bool) -> list[Tensor | None]:
    x = 3 * torch.randn(shape) + 0.5
    if not affine:
        return [x, None, None]
    return [x, torch.randn(shape[-1]), torch.randn(shape[-1]) if kind == "layer" else None]


def gradients(function, kind: str, tensors: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(kind, *leaves)
    y.backward(grad.to(y))
    given = {str(place): leaf for place, leaf in enumerate(leaves) if leaf is not None}
    assert_grads(given)
    return [y.detach(), *(leaf.grad for leaf in given.values())]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(device, kind, dtype, affine):
    for shape in SHAPES:
        tensors = [None if t is None else t.to(dtype) for t in drawn(shape, kind, affine)]
        grad = torch.randn(shape).to(dtype)
        there = [None if t is None else t.to(device) for t in tensors]
        got = gradients(call, kind, there, grad.to(device))
        plain = gradients(torch_call, kind, tensors, grad)
        exact = gradients(meant, kind, [None if t is None else t.double() for t in tensors], grad.double())
        for ours, theirs, want in zip(got, plain, exact, strict=True):
            assert ours.dtype == dtype
            if shape[-1] == 1:
                # A single column's gradient is a difference of equals, times up to 1 / sqrt(eps).
                torch.testing.assert_close(ours.cpu().double(), want, rtol=0.02, atol=2e-3)
            else:
                assert_accurate(ours, want, theirs, units=4.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    tensors = [None if t is None else t.double().requires_grad_() for t in drawn((3, 5), kind, True)]
    given = [t for t in tensors if t is not None]
    assert torch.autograd.gradcheck(lambda *t: call(kind, *t, *([None] * (3 - len(t)))), given)
    frozen = [given[0].detach(), *given[1:]]
    assert torch.autograd.gradcheck(lambda *t: call(kind, *t, *([None] * (3 - len(t)))), frozen)


def test_every_instruction_set_and_number_of_threads(cpu_level):
    for dtype in DTYPES:
        x, weight, bias = (t.to(dtype) for t in drawn((301, 517), "layer", True))
        grad = torch.randn(301, 517).to(dtype)
        exact = gradients(meant, "layer", [x.double(), weight.double(), bias.double()], grad.double())
        plain = gradients(torch_call, "layer", [x, weight, bias], grad)
        results = []
        for count in (1, 3):
            with threads(count):
                results.append(gradients(call, "layer", [x, weight, bias], grad))
        for ours, again, theirs, want in zip(*results, plain, exact, strict=True):
            assert torch.equal(ours, again)
            assert_accurate(ours, want, theirs, units=4.0)


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides_and_addresses(device, kind):
    _, weight, bias = drawn((1, 40), kind, True)
    weight, bias = weight.to(device), None if bias is None else bias.to(device)
    dense = torch.randn(6, 40).to(device)
    want = gradients(call, kind, [dense, weight, bias], dense)
    holder = torch.full((6, 83), float("nan"), device=device)
    for view in (holder[:, 1:81:2], holder.view(-1)[3:243].view(6, 40)):
        view.copy_(dense)
        got = gradients(call, kind, [view, weight, bias], view)
        for ours, expected in zip(got, want, strict=True):
            # The order of a sum depends on how wide the accesses may be.
            torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
        holder.fill_(float("nan"))


def test_a_row_knows_no_other_row(device):
    x = torch.randn(9, 70).to(device)
    want = pykern.layer_norm(x)
    x[4, 13] = float("nan")
    got = pykern.layer_norm(x)
    assert got[4].isnan().all()
    keep = [row for row in range(9) if row != 4]
    assert torch.equal(got[keep], want[keep])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)], ids=str)
def test_empty(device, shape):
    x = torch.zeros(shape).to(device).requires_grad_()
    weight = torch.ones(shape[-1]).to(device).requires_grad_()
    for y in (pykern.rms_norm(x, weight), pykern.layer_norm(x, weight, weight)):
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))


def test_ops(device):
    x, weight, bias = (t.to(device) for t in drawn((4, 24), "layer", True))
    ops = torch.ops.pykern
    for centred in (True, False):
        check_op(ops.norm.default, (x, weight, bias, 1e-5, centred))
        _, mean, rstd = ops.norm.default(x, weight, bias, 1e-5, centred)
        for wanted in ((True, True), (True, False), (False, False)):
            check_op(ops.norm_backward.default, (x, x, weight, mean, rstd, *wanted))


def test_compiles_whole():
    x, weight, bias = (t.requires_grad_() for t in drawn((4, 24), "layer", True))
    for function in (lambda: pykern.layer_norm(x, weight, bias), lambda: pykern.rms_norm(x, weight)):
        torch.testing.assert_close(compile_whole(function)(), function(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, dtype=torch.int64),), TypeError, "x: expected float32, float64, bfloat16 or float16, got"),
        ((torch.ones(()),), ValueError, "x: expected at least one dimension"),
        ((torch.ones(3), torch.ones(3).double()), TypeError, r"weight: expected x's torch.float32, got torch.float64"),
        ((torch.ones(3), torch.ones(4)), ValueError, r"weight: expected shape \(3,\)"),
        ((torch.ones(3), torch.ones(3), torch.ones(1, 3)), ValueError, r"bias: expected shape \(3,\)"),
        ((torch.ones(3), None, None, -1.0), ValueError, "eps: expected at least 0, got -1.0"),
        ((torch.ones(3), None, None, "1"), TypeError, "eps: expected a number, got str"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        pykern.layer_norm(*arguments)
