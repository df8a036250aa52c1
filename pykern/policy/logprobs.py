"""Log-probabilities of given tokens from logits."""

import torch
from torch import Tensor

from .logprobs_host import check_floating, check_targets, prepared_targets, prepared_temperature, result_dtype


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    sum_p2: bool = False,
    backward_in_place: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """log p of each target token under softmax(logits / temperature), in one read of the logits.

    With x = logits / temperature and p = softmax(x) over the last dimension:
    logprob = x[target] - log sum exp x; entropy H = -sum p log p (in nats); sum_p2 = sum p^2, which
    the optimal token baseline needs. All three have exact gradients:
    d logprob / dx_v = [v = target] - p_v, dH / dx_v = -p_v (log p_v + H), d sum_p2 / dx_v = 2 p_v (p_v - sum_p2).

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, any strides in the leading dimensions
            (`logits[:, :-1]` is read in place). -inf marks a vocabulary entry that can't be drawn.
        targets: int64 or int32 [...]. A negative target (-100 by custom) ignores its row: results 0,
            gradient 0, logits not read.
        temperature: a positive number, or a tensor of positive numbers broadcastable to `targets`
            (no gradient flows into it; those of ignored rows are not read).
        entropy: also return the entropy.
        sum_p2: also return the sum of squared probabilities.
        backward_in_place: the gradient is written over the logits, which are lost; saves a [..., V] buffer.
            For logits that nothing else needs once the backward has begun, as those of an output head:
            autograd refuses to go on where another op has saved them, but sees no use outside of it, such
            as that of a leaf. The rows must be contiguous and share no memory with each other. One backward
            only. Under torch.compile the gradient has a buffer of its own.

    Returns:
        logprobs [...], float32 (float64 for float64 logits); with `entropy` or `sum_p2` a tuple
        (logprobs, entropy, sum_p2) of the ones asked for.

    Math is in float32, for float64 logits in float64; sums are carried on in float64, on CUDA those of a warp's
    share of a row in float32. The gradient has the dtype of the logits. Both are the same bit for bit for any
    number of threads and of other rows; on CUDA, while a row's place modulo 16 bytes stays the same. Memory
    beyond results and gradient: two numbers per row.

    A target past the vocabulary, or a temperature in a tensor that is not positive, is refused on the CPU. On CUDA,
    where looking would wait for the device, such a target is not read, and its log-probability and the gradient of its
    row are NaN.

    Raises:
        TypeError, ValueError: an argument of unexpected type, shape or value.
        NotImplementedError: CUDA tensors, where the CUDA kernels are not loaded.
    """
    check_floating("token_logprobs", "logits", logits, "token_logprobs", "token_logprobs_backward")
    if logits.dim() < 1:
        raise ValueError("token_logprobs: logits: expected shape [..., V], got a scalar tensor")
    targets = prepared_targets("token_logprobs", targets, logits, "logits", logits.shape[:-1])
    check_targets("token_logprobs", targets, logits.shape[-1])
    row_temperature, temperature = prepared_temperature("token_logprobs", temperature, targets)
    if backward_in_place:
        _check_overwritable("token_logprobs", logits)
    elif logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    arguments = (logits, targets, row_temperature, temperature, entropy, sum_p2)
    if torch.is_grad_enabled() and logits.requires_grad:
        in_place = backward_in_place and not torch.compiler.is_compiling()
        results = (_TokenLogprobsInPlace if in_place else _TokenLogprobs).apply(*arguments)
    else:
        results = torch.ops.pykern.token_logprobs.default(*arguments)
    chosen = tuple(result for result, wanted in zip(results, (True, entropy, sum_p2)) if wanted)
    return chosen if len(chosen) > 1 else chosen[0]


def _check_overwritable(function: str, logits: Tensor) -> None:
    described = f"got shape {list(logits.shape)} with strides {list(logits.stride())}; pass logits.contiguous()"
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{function}: logits: expected contiguous rows with backward_in_place=True, {described}")
    extent = 1
    for stride, size in sorted((st, si) for st, si in zip(logits.stride(), logits.shape) if si > 1):
        if stride < extent:
            raise ValueError(
                f"{function}: logits: expected rows that share no memory with backward_in_place=True, {described}"
            )
        extent += stride * (size - 1)
    # Gaps are fine, many of them are not: the CUDA kernels find a row by four merged dimensions.
    leading = [(st, si) for st, si in zip(logits.stride()[:-1], logits.shape[:-1]) if si > 1]
    merged = sum(st != next_st * next_si for (st, _), (next_st, next_si) in zip(leading, leading[1:])) + 1
    if logits.is_cuda and merged > 4:
        raise ValueError(
            f"{function}: logits: expected leading dimensions that merge into 4 or fewer with backward_in_place=True, "
            f"{described}"
        )


# --- gradients ------------------------------------------------------------------------------------


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, row_temperature, temperature, entropy, sum_p2):
        ctx.set_materialize_grads(False)
        logprobs, entropies, squares, statistics = torch.ops.pykern.token_logprobs.default(
            logits, targets, row_temperature, temperature, entropy, sum_p2
        )
        ctx.save_for_backward(logits, targets, row_temperature, statistics, entropies, squares)
        ctx.temperature = temperature
        return logprobs, entropies, squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, grad_sum_p2):
        arguments = _TokenLogprobs.backward_arguments(ctx, grad_logprobs, grad_entropy, grad_sum_p2)
        grad_logits = torch.ops.pykern.token_logprobs_backward.default(*arguments)
        return grad_logits, None, None, None, None, None

    @staticmethod
    def backward_arguments(ctx, grad_logprobs, grad_entropy, grad_sum_p2):
        logits, targets, row_temperature, statistics, entropies, squares = ctx.saved_tensors
        return (
            logits,
            targets,
            row_temperature,
            ctx.temperature,
            statistics,
            entropies,
            squares,
            grad_logprobs,
            # What was not asked for has no elements, and no gradient that counts.
            grad_entropy if entropies.shape == targets.shape else None,
            grad_sum_p2 if squares.shape == targets.shape else None,
        )


class _TokenLogprobsInPlace(_TokenLogprobs):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, grad_sum_p2):
        if getattr(ctx, "logits_are_overwritten", False):
            raise RuntimeError(
                "token_logprobs: the first backward has overwritten the logits (backward_in_place=True); "
                "for a second one use backward_in_place=False"
            )
        logits, *others = _TokenLogprobs.backward_arguments(ctx, grad_logprobs, grad_entropy, grad_sum_p2)
        gradient = logits.detach()
        ctx.logits_are_overwritten = True
        torch.ops.pykern.token_logprobs_backward_in_place.default(gradient, *others)
        # Whoever else has saved the logits for its backward is told that they have changed.
        torch.autograd.graph.increment_version(logits)
        return gradient, None, None, None, None, None


# --- shapes for tracing ---------------------------------------------------------------------------


@torch.library.register_fake("pykern::token_logprobs")
def _(logits, targets, row_temperature, temperature, entropy, sum_p2):
    dtype = result_dtype(logits)
    return (
        logits.new_empty(targets.shape, dtype=dtype),
        logits.new_empty(targets.shape if entropy else (0,), dtype=dtype),
        logits.new_empty(targets.shape if sum_p2 else (0,), dtype=dtype),
        logits.new_empty((targets.numel(), 2), dtype=dtype),
    )


@torch.library.register_fake("pykern::token_logprobs_backward")
def _(logits, targets, row_temperature, temperature, statistics, entropy, sum_p2, g_logprobs, g_entropy, g_sum_p2):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("pykern::token_logprobs_backward_in_place")
def _(logits, targets, row_temperature, temperature, statistics, entropy, sum_p2, g_logprobs, g_entropy, g_sum_p2):
    return None
