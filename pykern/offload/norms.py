"""RMS norm and layer norm whose outputs the backward makes again."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _native
from . import recipes

_norm = torch.ops.pykern.norm.default
_norm_backward = torch.ops.pykern.norm_backward.default
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@torch.library.register_fake("pykern::norm")
def _(x, weight, bias, eps, centred):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = math.prod(x.shape[:-1])
    return torch.empty_like(x), x.new_empty(rows if centred else 0, dtype=dtype), x.new_empty(rows, dtype=dtype)


@torch.library.register_fake("pykern::norm_backward")
def _(grad, x, weight, mean, rstd, with_weight, with_bias):
    columns = x.shape[-1]
    lines = (x.new_empty(columns if wanted else 0) for wanted in (with_weight, with_bias))
    return torch.empty_like(x), *lines


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as torch.nn.functional.rms_norm.

    The graph keeps x and a float32 per row. Under `recompute_saved` or offload the output is not kept for the layers
    that read it either: it is made again from x. Differentiable once.

    Args:
        x: [..., columns]; float32, float64, bfloat16 or float16, float64 on the CPU only. Sums are taken in float32,
            for float64 in float64.
        weight: [columns], of x's dtype and device; None: ones.
        eps: a number of at least 0.

    Returns:
        Of x's shape and dtype, contiguous. A row of zeros with eps = 0 is NaN, as in PyTorch.

    Raises:
        TypeError, ValueError: naming the argument.

    Paper: arXiv 1910.07467.
    """
    return _apply(x, weight, None, eps, False)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension.

    As torch.nn.functional.layer_norm: the variance divides by the number of columns. All else as `rms_norm`, with a
    bias [columns] like the weight, and two float32 per row.

    Paper: arXiv 1607.06450.
    """
    return _apply(x, weight, bias, eps, True)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, centred):
        ctx.set_materialize_grads(False)
        y, mean, rstd = _norm(x.contiguous(), weight, bias, eps, centred)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 5
        x, weight, mean, rstd = ctx.saved_tensors
        _, with_weight, with_bias = ctx.needs_input_grad[:3]
        grad_x, grad_weight, grad_bias = _norm_backward(
            grad.contiguous(), x.contiguous(), weight, mean, rstd, with_weight, with_bias
        )
        return (
            grad_x, grad_weight if with_weight else None, grad_bias if with_bias else None, None, None
        )  # fmt: skip


def _apply(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {got}")
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got none; unsqueeze it")
    columns = x.shape[-1]
    for name, line in (("weight", weight), ("bias", bias)):
        if line is None:
            continue
        if not isinstance(line, Tensor) or line.dtype != x.dtype:
            got = line.dtype if isinstance(line, Tensor) else type(line).__name__
            raise TypeError(f"{name}: expected x's {x.dtype}, got {got}; convert it with .to(x.dtype)")
        if tuple(line.shape) != (columns,):
            raise ValueError(f"{name}: expected shape ({columns},), x's last dimension, got {tuple(line.shape)}")
        if line.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {line.device}")
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    _native.require_kernels(x, "x", "norm", "norm_backward")
    weight, bias = (None if line is None else line.contiguous() for line in (weight, bias))
    y = _Norm.apply(x, weight, bias, float(eps), centred)

    # Not the lines themselves: what made them would live as long as the output.
    are_given = [line is not None for line in (weight, bias)]

    def again(x: Tensor, *lines: Tensor) -> Tensor:
        given = iter(lines)
        weight, bias = (next(given) if is_given else None for is_given in are_given)
        return _norm(x.contiguous(), weight, bias, float(eps), centred)[0]

    recipes.attach(y, again, x, *(line for line in (weight, bias) if line is not None))
    return y
