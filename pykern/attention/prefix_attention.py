"""Attention over a packed prefix tree."""

import math

import torch
from torch import Tensor

from .. import _native
from .tree import PrefixTree

_MAX_HEAD_SIZE = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_forward = torch.ops.pykern.prefix_attention_forward.default
_backward = torch.ops.pykern.prefix_attention_backward.default


@torch.library.register_fake("pykern::prefix_attention_forward")
def _(q, k, v, subtree_end, scale):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[0], q.shape[1], dtype=lse_dtype)


@torch.library.register_fake("pykern::prefix_attention_backward")
def _(grad_out, grad_lse, q, k, v, out, lse, subtree_end, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, subtree_end, scale):
        out, lse = _forward(q, k, v, subtree_end, scale)
        ctx.save_for_backward(q, k, v, out, lse, subtree_end)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse, subtree_end = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return None, None, None, None, None
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        return *_backward(grad_out, grad_lse, q, k, v, out, lse, subtree_end, ctx.scale), None, None


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree | tuple[Tensor, Tensor],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of packed sequences that share prefixes, forward and backward, without repeating a prefix.

        out[i] = sum over visible j of softmax_j(scale * q[i] . k[j]) v[j],   j visible to i iff j <= i < subtree_end[j]

    q: [T, Hq, D]; k: [T, Hk, D]; v: [T, Hk, Dv]; Hq a multiple of Hk (query head h reads key head h // (Hq / Hk)),
        D and Dv at most 256; float32, bfloat16, float16 or float64, all alike; any strides.
    tree: a PrefixTree of T tokens, or its tensors (subtree_end, position), int32 [T] each. The values of a bare
        tuple are not checked; the rule above holds for any of them.
    scale: 1 / sqrt(D) if None.
    return_lse: also return the logarithm of each row's softmax denominator, [T, Hq], float32 (float64 for float64
        inputs); it is differentiable.

    Returns out [T, Hq, Dv] in q's dtype. A row that sees nothing has out 0, lse -inf and gradients 0. A key's
    value never reaches a row that doesn't see it, NaN and infinities included.
    Sums are taken in float32 (float64 for float64), dK and dV too, in an order that depends on shapes and tree only:
    results repeat bit for bit, whatever the number of threads.

    Raises TypeError or ValueError for inputs of other shapes, dtypes or devices, and NotImplementedError on devices
    that this build has no kernels for.
    """
    subtree_end = _check(q, k, v, tree)
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[2], 1))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _PrefixAttention.apply(q, k, v, subtree_end, float(scale))
    else:
        out, lse = _forward(q, k, v, subtree_end, float(scale))
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree | tuple[Tensor, Tensor]) -> Tensor:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 3:
            raise ValueError(
                f"{name}: expected [tokens, heads, head size], got shape {tuple(tensor.shape)}; "
                "pack the batch into one row of tokens"
            )
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {tensor.dtype}; cast them alike")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {tensor.device}")
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected q's {q.shape[0]} tokens, got {tensor.shape[0]}")
        if tensor.shape[2] > _MAX_HEAD_SIZE:
            raise ValueError(f"{name}: expected a head size of at most {_MAX_HEAD_SIZE}, got {tensor.shape[2]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected q's head size {q.shape[2]}, got {k.shape[2]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v: expected k's {k.shape[1]} heads, got {v.shape[1]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: expected a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")
    _native.require_kernels(q, "q", "prefix_attention_forward", "prefix_attention_backward")

    if isinstance(tree, PrefixTree):
        subtree_end = tree.subtree_end
    elif isinstance(tree, (tuple, list)) and len(tree) == 2 and all(isinstance(part, Tensor) for part in tree):
        subtree_end = tree[0]
        for name, tensor in (("tree[0] (subtree_end)", tree[0]), ("tree[1] (position)", tree[1])):
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name}: expected dtype torch.int32, got {tensor.dtype}; use .to(torch.int32)")
            if tensor.shape != subtree_end.shape or tensor.dim() != 1:
                raise ValueError(f"{name}: expected one dimension, subtree_end's, got shape {tuple(tensor.shape)}")
    else:
        raise TypeError(
            f"tree: expected a PrefixTree or a tuple (subtree_end, position) of tensors, got {type(tree).__name__}"
        )
    if subtree_end.shape[0] != q.shape[0]:
        raise ValueError(f"tree: expected q's {q.shape[0]} tokens, got {subtree_end.shape[0]}")
    if subtree_end.device != q.device:
        raise ValueError(f"tree: expected q's device {q.device}, got {subtree_end.device}; use tree.to(q.device)")
    return subtree_end


__all__ = ["prefix_attention"]
