"""Gated activation functions whose outputs the backward makes again, and dropout without a mask in memory."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _native
from . import recipes
from .norms import _FLOATS

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""x / (1 + exp(-x)); x Phi(x) with the normal distribution; x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""

_activation = torch.ops.pykern.activation.default
_activation_backward = torch.ops.pykern.activation_backward.default
_seeded_dropout = torch.ops.pykern.seeded_dropout.default


@torch.library.register_fake("pykern::activation")
def _(gate, up, kind):
    return torch.empty_like(gate)


@torch.library.register_fake("pykern::activation_backward")
def _(grad, gate, up, kind):
    return torch.empty_like(gate), gate.new_empty(0) if up is None else torch.empty_like(gate)


@torch.library.register_fake("pykern::seeded_dropout")
def _(x, seed, p):
    return torch.empty_like(x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), or with approximate="tanh" its approximation, as torch.nn.functional.gelu. See `gated_activation`.

    Paper: arXiv 1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return gated_activation(x, activation="gelu" if approximate == "none" else "gelu_tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the middle of a Llama's MLP. See `gated_activation`.

    Paper: arXiv 2002.05202.
    """
    return gated_activation(gate, up, activation="silu")


def gated_activation(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """f(gate) * up, or f(gate), in one pass; forward and backward keep the inputs alone.

    Under `recompute_saved` or offload the output is not kept for the layers that read it either: it is made again.
    Differentiable once.

    Args:
        gate, up: of one shape, dtype and device; float32, float64, bfloat16 or float16, float64 on the CPU only.
            Computed in float32, for float64 in float64, and rounded once.
        activation: a row of ACTIVATIONS.

    Returns:
        Of gate's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check(gate, "gate")
    if up is not None:
        _check(up, "up")
        if up.dtype != gate.dtype:
            raise TypeError(f"up: expected gate's {gate.dtype}, got {up.dtype}")
        if up.shape != gate.shape:
            raise ValueError(f"up: expected gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
        if up.device != gate.device:
            raise ValueError(f"up: expected gate's device {gate.device}, got {up.device}")
    _native.require_kernels(gate, "gate", "activation", "activation_backward")
    kind = ACTIVATIONS.index(activation)
    y = _Activation.apply(gate, up, kind)

    def again(gate: Tensor, up: Tensor | None = None) -> Tensor:
        return _activation(gate.contiguous(), None if up is None else up.contiguous(), kind)

    recipes.attach(y, again, *(tensor for tensor in (gate, up) if tensor is not None))
    return y


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _activation(gate.contiguous(), None if up is None else up.contiguous(), kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        dense = (grad.contiguous(), gate.contiguous(), None if up is None else up.contiguous())
        grad_gate, grad_up = _activation_backward(*dense, ctx.kind)
        return grad_gate, None if up is None else grad_up, None


def dropout(x: Tensor, p: float = 0.5, training: bool = True, *, seed: int | Tensor | None = None) -> Tensor:
    """Each element becomes 0 with probability p, the others are multiplied by 1 / (1 - p).

    The mask is a function of a seed and the element's index (Philox4x32-10, Salmon et al., SC 2011): the backward makes
    it again, so that the graph keeps eight bytes. The same seed drops the same elements on every device and for
    every dtype. What is dropped is selected, never multiplied: NaN and infinities there become 0.

    Args:
        x: float32, float64, bfloat16 or float16, float64 on the CPU only.
        p: a share from 0 to 1.
        training: without it, or with p = 0, x itself is returned.
        seed: an integer, or a tensor int64 [1] on x's device; None: drawn from torch's generator of x's device, without
            waiting for it.

    Returns:
        Of x's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check(x, "x")
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise TypeError(f"p: expected a number, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a share from 0 to 1, got {p}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            got = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            raise ValueError(f"seed: expected one int64 on {x.device}, got {got}")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: expected an integer or a tensor, got {type(seed).__name__}")
    if not training or p == 0:
        return x
    _native.require_kernels(x, "x", "seeded_dropout")
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((1,), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=x.device)
    return _Dropout.apply(x, seed, float(p))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, p):
        ctx.save_for_backward(seed)
        ctx.p = p
        return _seeded_dropout(x.contiguous(), seed, p)

    @staticmethod
    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        return _Dropout.apply(grad, seed, ctx.p), None, None


def _check(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {got}")
