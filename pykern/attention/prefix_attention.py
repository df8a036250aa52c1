"""Attention over a packed prefix tree."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .tiles import BLOCK_TOKENS, TILE_TOKENS, tree_tiles
from .tree import PrefixTree

_MAX_HEAD_SIZE = 256
_MAX_WINDOW = 2**31 - 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_GPU_DTYPES = (torch.bfloat16, torch.float16)

_forward = torch.ops.pykern.prefix_attention_forward.default
_backward = torch.ops.pykern.prefix_attention_backward.default


@torch.library.register_fake("pykern::prefix_attention_forward")
def _(
    q, k, v, subtree_end, position, bounds, order, sinks, alibi_slopes, scale, window, softcap, return_max_logits,
    order_invariant,
):  # fmt: skip
    statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[0], q.shape[1], dtype=statistic),
        q.new_empty(q.shape[1] if return_max_logits else 0, dtype=statistic),
    )


@torch.library.register_fake("pykern::prefix_attention_backward")
def _(
    grad_out, grad_lse, q, k, v, out, lse, subtree_end, position, bounds, order, sinks, alibi_slopes, scale, window,
    softcap,
):  # fmt: skip
    grad_sinks = lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, tree, alibi_slopes, score, return_max_logits, order_invariant):
        out, lse, max_logits = _forward(q, k, v, *tree, sinks, alibi_slopes, *score, return_max_logits, order_invariant)
        ctx.save_for_backward(q, k, v, sinks, out, lse, alibi_slopes, *tree)
        ctx.score = score
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(max_logits)
        return out, lse, max_logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse, _):
        q, k, v, sinks, out, lse, alibi_slopes, *tree = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 9
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        *grads, grad_sinks = _backward(grad_out, grad_lse, q, k, v, out, lse, *tree, sinks, alibi_slopes, *ctx.score)
        return *grads, None if sinks is None else grad_sinks, None, None, None, None, None


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: PrefixTree | tuple[Tensor, ...],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    order_invariant: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Exact attention of packed sequences that share prefixes, forward and backward, without repeating a prefix.

        s[i, j] = scale * q[i] . k[j]                                 of head h, for keys j that query i sees
        s[i, j] = softcap * tanh(s[i, j] / softcap)                   with softcap
        s[i, j] = s[i, j] - alibi_slopes[h] * (position[i] - position[j])
        lse[i]  = log(sum over j of exp(s[i, j]) + exp(sinks[h]))     without sinks, the first sum alone
        out[i]  = sum over j of exp(s[i, j] - lse[i]) v[j]

    Query i sees key j iff j <= i < subtree_end[j] and, with a window, position[i] - position[j] < window. Positions
    count along a token's own path, so windows and ALiBi mean on a tree what they mean for each of its sequences.

    q: [T, Hq, D]; k: [T, Hk, D]; v: [T, Hk, Dv]; Hq a multiple of Hk (query head h reads key head h // (Hq / Hk)),
        D and Dv at most 256; any strides. All of one dtype: float32, bfloat16, float16 or float64 on the CPU,
        bfloat16 or float16 on a GPU.
    tree: a PrefixTree of T tokens, its `tensors`, or (subtree_end, position) alone, int32 [T] each, from which the
        others are made anew in every call. The values of bare tensors are not checked; the rules above hold for any.
    scale: 1 / sqrt(D) if None. window: at least 1, in tokens, the query itself counted. softcap: above 0 (Gemma 2).
    sinks: [Hq], a logit per head that takes part of the softmax but has no value (gpt-oss); has a gradient.
    alibi_slopes: [Hq] (Press et al., arXiv 2108.12409); no gradient. Both of any floating dtype, read in float32.
    return_lse: also return lse [T, Hq], float32 (float64 for float64 inputs); it is differentiable.
    return_max_logits: also return the largest s of each head over all that is visible, [Hq] in lse's dtype, sinks not
        counted, -inf where nothing is visible: what QK-clip asks for. Not differentiable.
    order_invariant: the output of a token has the same bits whether its sequence is packed with others or stands
        alone, at some cost in time: keys are summed in blocks that are cut by position, not by row. Needs a tree
        whose positions count every token of a path, as those of a PrefixTree do. Gradients are those of the
        ordinary mode.

    Returns out [T, Hq, Dv] in q's dtype, followed by what was asked for. A row that sees nothing has out 0, lse -inf
    and gradients 0, sinks or not. On the CPU a key's value never reaches a row that doesn't see it, NaN and infinities
    included; on a GPU that holds for padding, while those of a visible key may reach its neighbours of other branches.
    Sums are taken in float32 (float64 for float64), dK and dV too, in an order that depends on shapes and tree only:
    results repeat bit for bit, whatever the number of threads.

    Raises TypeError or ValueError for inputs of other shapes, dtypes or devices, and NotImplementedError on devices
    that this build has no kernels for.
    """
    tree = _check(q, k, v, tree)
    statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
    sinks = _check_per_head(sinks, "sinks", q, statistic)
    alibi_slopes = _check_per_head(alibi_slopes, "alibi_slopes", q, statistic)
    score = _check_score(q, scale, window, softcap)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach()
    leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        out, lse, max_logits = _PrefixAttention.apply(
            q, k, v, sinks, tree, alibi_slopes, score, bool(return_max_logits), bool(order_invariant)
        )
    else:
        out, lse, max_logits = _forward(
            q, k, v, *tree, sinks, alibi_slopes, *score, bool(return_max_logits), bool(order_invariant)
        )
    results = (out, *((lse,) if return_lse else ()), *((max_logits,) if return_max_logits else ()))
    return results if len(results) > 1 else out


def _check_score(q: Tensor, scale: float | None, window: int | None, softcap: float | None) -> tuple[float, int, float]:
    """(scale, window, softcap) as the ops take them: 0 for no window and no softcap."""
    for name, number in (("scale", scale), ("softcap", softcap)):
        if isinstance(number, Tensor) and number.requires_grad:
            raise TypeError(
                f"{name}: expected a number, got a tensor that requires a gradient and would get none; pass "
                f"float({name}), or for a learned scale multiply q by it and pass scale=1.0"
            )
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[2], 1))
    if window is not None and (isinstance(window, bool) or not isinstance(window, (int, torch.SymInt))):
        raise TypeError(f"window: expected an integer or None, got {type(window).__name__}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}; None is no window")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a finite number above 0, got {softcap}; None is no softcap")
    return float(scale), 0 if window is None else min(window, _MAX_WINDOW), 0.0 if softcap is None else float(softcap)


def _check_per_head(values: Tensor | None, name: str, q: Tensor, dtype: torch.dtype) -> Tensor | None:
    if values is None:
        return None
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {values.dtype}")
    if values.shape != (q.shape[1],):
        raise ValueError(f"{name}: expected one value per query head, [{q.shape[1]}], got {tuple(values.shape)}")
    if values.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {values.device}")
    return values.to(dtype).contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, tree: PrefixTree | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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
        if q.is_cuda and tensor.dtype not in _GPU_DTYPES:
            raise TypeError(f"{name}: expected bfloat16 or float16 on a GPU, got {tensor.dtype}; cast q, k and v")
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
        tensors = tree.tensors
    elif isinstance(tree, (tuple, list)) and len(tree) in (2, 4) and all(isinstance(part, Tensor) for part in tree):
        _check_tensors(tree)
        tensors = tuple(part.contiguous() for part in tree)
    else:
        raise TypeError(
            "tree: expected a PrefixTree, its tensors or (subtree_end, position), got "
            f"{type(tree).__name__}{f' of {len(tree)}' if isinstance(tree, (tuple, list)) else ''}"
        )
    if tensors[0].shape[0] != q.shape[0]:
        raise ValueError(f"tree: expected q's {q.shape[0]} tokens, got {tensors[0].shape[0]}")
    if tensors[0].device != q.device:
        raise ValueError(f"tree: expected q's device {q.device}, got {tensors[0].device}; use tree.to(q.device)")
    return tensors if len(tensors) == 4 else (*tensors, *tree_tiles(*tensors))


def _check_tensors(tensors: Sequence[Tensor]) -> None:
    tokens = tensors[0].shape[0] if tensors[0].dim() else 0
    tiles, blocks = -(-tokens // TILE_TOKENS), -(-tokens // BLOCK_TOKENS)
    shapes = {"subtree_end": (tokens,), "position": (tokens,), "bounds": (tiles, 4), "order": (2, blocks)}
    for index, ((name, shape), tensor) in enumerate(zip(shapes.items(), tensors, strict=False)):
        if tensor.dtype != torch.int32:
            raise TypeError(
                f"tree[{index}] ({name}): expected dtype torch.int32, got {tensor.dtype}; use .to(torch.int32)"
            )
        if tensor.shape != shape:
            raise ValueError(f"tree[{index}] ({name}): expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != tensors[0].device:
            raise ValueError(f"tree[{index}] ({name}): expected device {tensors[0].device}, got {tensor.device}")


__all__ = ["prefix_attention"]
