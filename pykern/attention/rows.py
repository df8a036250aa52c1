"""Gathering rows, such as those that predict response tokens, with a gradient that repeats bit for bit."""

import torch
from torch import Tensor

from .. import _native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_gather = torch.ops.pykern.gather_rows.default
_backward = torch.ops.pykern.gather_rows_backward.default


@torch.library.register_fake("pykern::gather_rows")
def _(source, rows):
    return source.new_empty(rows.shape[0], source.shape[1])


@torch.library.register_fake("pykern::gather_rows_backward")
def _(grad_out, order, offsets):
    return grad_out.new_empty(offsets.shape[0] - 1, grad_out.shape[1])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, rows, order, offsets):
        ctx.save_for_backward(rows, order, offsets)
        ctx.source_rows = source.shape[0]
        return _gather(source, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        rows, order, offsets = ctx.saved_tensors
        if order is None:
            order, offsets = invert_rows(rows, ctx.source_rows)
        return _backward(_with_rows_together(grad_out), order, offsets), None, None, None


def invert_rows(rows: Tensor, source_rows: int) -> tuple[Tensor, Tensor]:
    """Where each of `source_rows` rows is used: (order, offsets), both int64.

    Row s is used by `order[offsets[s] : offsets[s + 1]]`, ascending: those n with `rows[n] == s`. On a GPU nothing
    waits for the host.
    """
    ordered, order = torch.sort(rows, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(source_rows + 1, device=rows.device))
    return order, offsets


def gather_rows(source: Tensor, rows: Tensor, *, order: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """out[n] = source[rows[n]], differentiable; rows may repeat and come in any order.

    `index_select` in one pass, with a gradient that is summed without atomics: the gradient of a source row is the sum
    over its uses, in ascending n, in float32 (float64 for float64), rounded once. It repeats bit for bit on the CPU and
    on a GPU, and rows without a use get 0. `PackedBatch.gather` calls this for the rows that predict response tokens.

    source: [S, C], float32, bfloat16, float16 or float64; any row stride.
    rows: int64 [N], 0 to S - 1. On the CPU others raise ValueError. On a GPU they are not looked at before the launch,
        which would mean waiting for it: such a row of `out` is NaN, and its gradient goes nowhere.
    order, offsets: int64 [N] and [S + 1], what `pykern.attention.rows.invert_rows(rows, S)` returns, for callers that
        have them already; computed in the backward if left out, by a sort.

    Returns [N, C]. Raises TypeError or ValueError for inputs of other shapes, dtypes or devices, and
    NotImplementedError on devices that this build has no kernels for.
    """
    _check(source, rows, order, offsets)
    source = _with_rows_together(source)
    rows = rows.contiguous()
    if torch.is_grad_enabled() and source.requires_grad:
        if order is not None:
            order, offsets = order.contiguous(), offsets.contiguous()
        return _GatherRows.apply(source, rows, order, offsets)
    return _gather(source, rows)


def _with_rows_together(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def _check(source: Tensor, rows: Tensor, order: Tensor | None, offsets: Tensor | None) -> None:
    if not isinstance(source, Tensor):
        raise TypeError(f"source: expected a tensor, got {type(source).__name__}")
    if source.dtype not in _DTYPES:
        raise TypeError(f"source: expected float32, bfloat16, float16 or float64, got {source.dtype}")
    if source.dim() != 2:
        raise ValueError(f"source: expected [rows, columns], got shape {tuple(source.shape)}; flatten other dimensions")
    if (order is None) != (offsets is None):
        raise ValueError(
            "order, offsets: expected both or none; pykern.attention.rows.invert_rows(rows, len(source)) returns both"
        )
    sizes = {"rows": None, "order": rows, "offsets": source}
    for (name, like), tensor in zip(sizes.items(), (rows, order, offsets), strict=True):
        if tensor is None and name != "rows":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected an int64 tensor, got {got}")
        if tensor.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {tuple(tensor.shape)}")
        if tensor.device != source.device:
            raise ValueError(f"{name}: expected source's device {source.device}, got {tensor.device}; move it there")
        wanted = None if like is None else like.shape[0] + (name == "offsets")
        if wanted is not None and tensor.shape[0] != wanted:
            raise ValueError(f"{name}: expected {wanted} values, got {tensor.shape[0]}")
    _native.require_kernels(source, "source", "gather_rows", "gather_rows_backward")
    if not torch.compiler.is_compiling() and rows.is_cpu and rows.numel() > 0:
        least, most = (int(value) for value in rows.aminmax())
        if least < 0 or most >= source.shape[0]:
            raise ValueError(
                f"rows: expected values from 0 to {source.shape[0] - 1}, got {least if least < 0 else most}"
            )


__all__ = ["gather_rows", "invert_rows"]
