"""Gated activation functions and seeded dropout against the float64 reference, beside PyTorch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import pykern
from pykern.offload.pointwise import ACTIVATIONS
from pykern.reference import offload_recompute as reference
from tests.support import assert_accurate, check_op, compile_whole, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the borders of packs, of the 64 elements whose words are drawn together, and of a grid.
SIZES = [1, 3, 4, 5, 8, 63, 64, 65, 1023, 2048, 40001]

TORCH = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(device, name, dtype, gated):
    def ours(gate: Tensor, up: Tensor | None = None) -> Tensor:
        return pykern.gated_activation(gate, up, activation=name)

    def plain(gate: Tensor, up: Tensor | None = None) -> Tensor:
        return TORCH[name](gate) if up is None else TORCH[name](gate) * up

    def meant(gate: Tensor, up: Tensor | None = None) -> Tensor:
        return reference.activation(gate, up, name)

    for size in SIZES:
        inputs = [(scale * torch.randn(size)).to(dtype) for scale in ((3.0, 1.0) if gated else (3.0,))]
        grad = torch.randn(size).to(dtype)
        got = gradients(ours, [tensor.to(device) for tensor in inputs], grad.to(device))
        exact = gradients(meant, [tensor.double() for tensor in inputs], grad.double())
        for mine, theirs, want in zip(got, gradients(plain, inputs, grad), exact, strict=True):
            assert mine.dtype == dtype
            assert_accurate(mine, want, theirs)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_from_zero(device, name):
    """Every magnitude that float32 has: no overflow on the way, and the tail relative to itself."""
    x = torch.cat([torch.logspace(-30, 30, 400), torch.linspace(0, 12, 400)])
    x = torch.cat([-x, x])
    value, slope = gradients(
        lambda gate: pykern.gated_activation(gate, activation=name), [x.to(device)], torch.ones_like(x).to(device)
    )
    exact, exact_slope = gradients(lambda gate: reference.activation(gate, None, name), [x.double()], torch.ones(1600))
    assert value.isfinite().all() and slope.isfinite().all()
    torch.testing.assert_close(slope.cpu().double(), exact_slope, rtol=1e-5, atol=1e-6)
    near = exact.abs() > 1e-30
    error = ((value.cpu().double() - exact) / exact)[near].abs()
    # The tanh form is a difference near its tail in the reference too; e^-x^2/2 carries x^2/2 roundings.
    assert error[(x[near] > -4)].max() < 2e-6
    assert error.max() < (2e-5 if name != "gelu_tanh" else 1.0)


def test_activation_special_values(device):
    x = torch.tensor([float("inf"), float("nan"), 0.0, -0.0])
    for name in ACTIVATIONS:
        value, slope = gradients(
            lambda x, name=name: pykern.gated_activation(x, activation=name), [x.to(device)], torch.ones(4).to(device)
        )
        torch.testing.assert_close(value.cpu(), x, equal_nan=True, rtol=0, atol=0)
        assert slope[0] == 1 and slope[1].isnan() and slope[2] == 0.5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_gradcheck(name):
    gate, up = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: pykern.gated_activation(g, u, activation=name), (gate, up))
    assert torch.autograd.gradcheck(lambda g: pykern.gated_activation(g, activation=name), (gate,))


def test_names():
    x, up = torch.randn(50), torch.randn(50)
    assert torch.equal(pykern.gelu(x), pykern.gated_activation(x, activation="gelu"))
    assert torch.equal(pykern.gelu(x, "tanh"), pykern.gated_activation(x, activation="gelu_tanh"))
    assert torch.equal(pykern.swiglu(x, up), pykern.gated_activation(x, up))


def test_every_instruction_set_and_number_of_threads(cpu_level):
    for dtype in DTYPES:
        gate, up, grad = (torch.randn(70001).to(dtype) for _ in range(3))
        for name in ACTIVATIONS:
            function = lambda g, u, name=name: pykern.gated_activation(g, u, activation=name)  # noqa: E731
            exact = reference.activation(gate.double(), up.double(), name)
            results = []
            for count in (1, 3):
                with threads(count):
                    results.append(gradients(function, [gate, up], grad))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            assert_accurate(results[0][0], exact, TORCH[name](gate) * up)
        dropped = pykern.dropout(gate, 0.4, seed=11)
        assert torch.equal(dropped, expected_dropout(gate, 11, 0.4))


def expected_dropout(x: Tensor, seed: int, p: float) -> Tensor:
    """The reference's elements; the factor is rounded to float32 once."""
    kept = reference.dropout(torch.ones_like(x, dtype=torch.float64, device="cpu"), seed, p) != 0
    scale = torch.tensor(1 / (1 - p) if p < 1 else 0.0, dtype=torch.float32)
    return torch.where(kept, (x.cpu().float() * scale).to(x.dtype), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(device, dtype):
    for size in SIZES:
        for seed, p in ((0, 0.5), (-1, 0.1), (2**40 + 7, 0.9), (3, 1.0)):
            x, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
            y, grad_x = gradients(
                lambda x, p=p, seed=seed: pykern.dropout(x, p, seed=seed), [x.to(device)], grad.to(device)
            )
            assert torch.equal(y.cpu(), expected_dropout(x, seed, p))
            assert torch.equal(grad_x.cpu(), expected_dropout(grad, seed, p))


def test_dropout_share_and_independence():
    y = pykern.dropout(torch.ones(1 << 20), 0.3, seed=1)
    kept = (y != 0).double()
    assert abs(kept.mean().item() - 0.7) < 5 * (0.21 / 2**20) ** 0.5
    for lag in (1, 2, 3, 4, 64):
        product = (kept[lag:] - 0.7) * (kept[:-lag] - 0.7)
        assert abs(product.mean().item()) < 5 * 0.21 / 2**10
    torch.manual_seed(3)
    first = pykern.dropout(torch.ones(1000))
    second = pykern.dropout(torch.ones(1000))
    torch.manual_seed(3)
    assert torch.equal(first, pykern.dropout(torch.ones(1000))) and not torch.equal(first, second)


def test_dropout_selects(device):
    x = torch.full((1000,), float("nan")).to(device)
    y = pykern.dropout(x, 0.5, seed=2)
    assert torch.equal(y.isnan().cpu(), expected_dropout(torch.ones(1000), 2, 0.5) != 0)
    assert (pykern.dropout(x, 1.0) == 0).all()
    assert pykern.dropout(x, 0.5, training=False) is x and pykern.dropout(x, 0.0) is x


def test_dropout_keeps_no_mask():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        pykern.dropout(torch.randn(4096, requires_grad=True), 0.5)
    assert saved == [1]


def test_dropout_gradcheck():
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pykern.dropout(x, 0.5, seed=1), (x,))
    assert torch.autograd.gradgradcheck(lambda x: pykern.dropout(x, 0.5, seed=1).square(), (x,))


def test_any_strides_and_addresses(device):
    gate, up = torch.randn(500).to(device), torch.randn(500).to(device)
    want = gradients(pykern.swiglu, [gate, up], gate)
    holder = torch.full((2, 1100), float("nan"), device=device)
    for view in (holder[:, 1:1001:2], holder[:, 1:501]):
        view[0].copy_(gate)
        view[1].copy_(up)
        got = gradients(pykern.swiglu, [view[0], view[1]], view[0])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(pykern.dropout(view[0], 0.5, seed=4), pykern.dropout(gate, 0.5, seed=4))
        holder.fill_(float("nan"))


def test_empty(device):
    x = torch.zeros(0, 3).to(device).requires_grad_()
    for y in (pykern.swiglu(x, x), pykern.gelu(x), pykern.dropout(x, 0.5)):
        assert y.shape == (0, 3)
        y.sum().backward()
        assert x.grad.shape == (0, 3)


def test_ops(device):
    gate, up = torch.randn(5, 9).to(device), torch.randn(5, 9).to(device)
    ops = torch.ops.pykern
    for other in (up, None):
        check_op(ops.activation.default, (gate, other, 0))
        check_op(ops.activation_backward.default, (gate, gate, other, 1))
    check_op(ops.seeded_dropout.default, (gate, torch.tensor([3]).to(device), 0.5))


def test_compiles_whole():
    gate, up = torch.randn(40, requires_grad=True), torch.randn(40)
    for function in (lambda: pykern.swiglu(gate, up), lambda: pykern.dropout(gate, 0.5, seed=3)):
        assert torch.equal(compile_whole(function)(), function())


X = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pykern.gelu(X, "erf"), ValueError, "approximate: expected 'none' or 'tanh', got 'erf'"),
        (lambda: pykern.gated_activation(X, activation="relu"), ValueError, "activation: expected one of silu"),
        (lambda: pykern.swiglu(X, 2), TypeError, "up: expected float32, float64, bfloat16 or float16, got int"),
        (lambda: pykern.swiglu(X, X.double()), TypeError, "up: expected gate's torch.float32, got torch.float64"),
        (lambda: pykern.swiglu(X, torch.ones(4)), ValueError, r"up: expected gate's shape \(3,\), got \(4,\)"),
        (lambda: pykern.dropout(X.long()), TypeError, "x: expected float32"),
        (lambda: pykern.dropout(X, 1.5), ValueError, "p: expected a share from 0 to 1, got 1.5"),
        (lambda: pykern.dropout(X, "1"), TypeError, "p: expected a number, got str"),
        (lambda: pykern.dropout(X, seed=1.0), TypeError, "seed: expected an integer or a tensor, got float"),
        (lambda: pykern.dropout(X, seed=torch.ones(1)), ValueError, "seed: expected one int64 on cpu, got"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
