"""Log-probabilities of given tokens, from logits or straight from hidden states and the output head."""

import math

import torch
from torch import Tensor

from .. import _native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
            (no gradient flows into it).
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

    A target past the vocabulary is refused on the CPU. On CUDA, where looking would wait for the device, it is
    not read, and its log-probability and the gradient of its row are NaN.

    Raises:
        TypeError, ValueError: an argument of unexpected type, shape or value.
        NotImplementedError: CUDA tensors, where the CUDA kernels are not loaded.
    """
    _check_floating("token_logprobs", "logits", logits)
    if logits.dim() < 1:
        raise ValueError("token_logprobs: logits: expected shape [..., V], got a scalar tensor")
    targets = _prepared_targets("token_logprobs", targets, logits, "logits", logits.shape[:-1], logits.shape[-1])
    row_temperature, temperature = _prepared_temperature("token_logprobs", temperature, targets)
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


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p of each target token under the output head; the [N, V] logits never exist.

    logits = cap(hidden @ weight.T + bias) / temperature, with cap(z) = softcap * tanh(z / softcap)
    (the identity without a softcap); then as `token_logprobs`. The forward keeps two numbers per
    token. The backward recomputes the logits tile by tile, in the manner of Cut Cross-Entropy
    (arXiv 2411.09009) without its gradient filtering: every gradient is exact. Tokens whose target
    is ignored or whose incoming gradient is exactly 0 take no part in it.

    Args:
        hidden: [N, H], float32, bfloat16, float16 or float64.
        weight: [V, H], the output head as in nn.Linear.weight, of the dtype of `hidden`.
        targets: int64 or int32 [N]. A negative target (-100 by custom) ignores its row: results 0,
            gradient 0, hidden state not read.
        bias: [V], any floating dtype, or None. -inf marks a vocabulary entry that can't be drawn.
        temperature: a positive number, or a tensor of positive numbers broadcastable to [N]
            (no gradient flows into it).
        softcap: positive bound of the logits, or None.
        entropy: also return the entropy of each token's distribution, in nats.

    Returns:
        logprobs [N], float32 (float64 for float64 inputs); with `entropy` the pair (logprobs, entropy).

    Products of bfloat16 are taken in bfloat16 where the processor has them, with float32 sums; all
    other math is in float32, also for float16. Gradients are accumulated in float32 and have the
    dtypes of their tensors. Results and gradients are the same bit for bit for any number of threads.
    Workspace: in the forward one copy of `hidden` and at most 400 bytes per token; in the backward two
    copies of `hidden`, its gradient in float32, and about 24 MiB plus H KiB per thread, whatever V.

    Raises:
        TypeError, ValueError: an argument of unexpected type, shape or value.
        NotImplementedError: CUDA tensors, for which there is no kernel of it yet.
    """
    name = "linear_token_logprobs"
    _check_floating(name, "hidden", hidden)
    _check_floating(name, "weight", weight)
    if hidden.dim() != 2:
        raise ValueError(f"{name}: hidden: expected shape [N, H], got {list(hidden.shape)}; flatten leading dimensions")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{name}: weight: expected shape [V, {hidden.shape[1]}], got {list(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{name}: weight: expected the dtype of hidden, {hidden.dtype}, got {weight.dtype}; cast one of them"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{name}: weight: expected on {hidden.device}, got on {weight.device}; move one of them")
    targets = _prepared_targets(name, targets, hidden, "hidden", hidden.shape[:1], weight.shape[0])
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError(f"{name}: bias: expected a floating-point tensor or None, got {_described(bias)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
        if bias.device != hidden.device:
            raise ValueError(f"{name}: bias: expected on {hidden.device}, got on {bias.device}; move it there")
        bias = bias.to(torch.float64).contiguous()
    row_temperature, temperature = _prepared_temperature(name, temperature, targets)
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"{name}: softcap: expected a positive finite number or None, got {softcap!r}")
    softcap = 0.0 if softcap is None else float(softcap)
    if hidden.shape[1] > 1:
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
    arguments = (hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        results = _LinearTokenLogprobs.apply(*arguments)
    else:
        results = torch.ops.pykern.linear_token_logprobs.default(*arguments)
    return (results[0], results[1]) if entropy else results[0]


# --- arguments ------------------------------------------------------------------------------------


def _described(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _check_floating(function: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{function}: {name}: expected a tensor of float32, bfloat16, float16 or float64, got {_described(tensor)}"
        )
    _native.require_kernels(tensor, name, function, f"{function}_backward")


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


def _prepared_targets(
    function: str, targets: Tensor, rows: Tensor, rows_name: str, shape: torch.Size, vocabulary: int
) -> Tensor:
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{function}: targets: expected a tensor of int64 or int32, got {_described(targets)}")
    if targets.shape != shape:
        raise ValueError(
            f"{function}: targets: expected shape {list(shape)}, one per row of {rows_name}, got {list(targets.shape)}"
        )
    if targets.device != rows.device:
        raise ValueError(f"{function}: targets: expected on {rows.device}, got on {targets.device}; move it there")
    # On the CPU only, where looking costs no synchronisation; compiled code leaves it to the op itself.
    if not torch.compiler.is_compiling() and targets.is_cpu and targets.numel() > 0:
        largest = int(targets.max())
        if largest >= vocabulary:
            raise ValueError(
                f"{function}: targets: expected values below the vocabulary size {vocabulary}, got {largest}; "
                "use a negative value for rows to ignore"
            )
    return targets.to(torch.int64).contiguous()


def _prepared_temperature(function: str, temperature: float | Tensor, targets: Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError(f"{function}: temperature: expected no requires_grad, as none is computed; pass .detach()")
        if not temperature.is_floating_point():
            raise TypeError(f"{function}: temperature: expected a floating-point tensor, got {temperature.dtype}")
        try:
            expanded = temperature.expand(targets.shape)
        except RuntimeError:
            raise ValueError(
                f"{function}: temperature: expected a shape that broadcasts to {list(targets.shape)}, "
                f"got {list(temperature.shape)}"
            ) from None
        return expanded.to(device=targets.device, dtype=torch.float64).contiguous(), 1.0
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ValueError(f"{function}: temperature: expected a positive finite number or a tensor, got {temperature!r}")
    return None, float(temperature)


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


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy):
        ctx.set_materialize_grads(False)
        logprobs, entropies, statistics = torch.ops.pykern.linear_token_logprobs.default(
            hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy
        )
        ctx.save_for_backward(hidden, weight, targets, bias, row_temperature, statistics, entropies)
        ctx.temperature, ctx.softcap = temperature, softcap
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, bias, row_temperature, statistics, entropies = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        grad_hidden, grad_weight, grad_bias = torch.ops.pykern.linear_token_logprobs_backward.default(
            hidden,
            weight,
            targets,
            bias,
            row_temperature,
            ctx.temperature,
            ctx.softcap,
            statistics,
            entropies,
            grad_logprobs,
            grad_entropy if entropies.shape == targets.shape else None,
            needs_hidden,
            needs_weight,
            needs_bias,
        )
        return (
            grad_hidden if needs_hidden else None,
            grad_weight if needs_weight else None,
            None,
            grad_bias if needs_bias else None,
            None,
            None,
            None,
            None,
        )


# --- shapes for tracing ---------------------------------------------------------------------------


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.library.register_fake("pykern::token_logprobs")
def _(logits, targets, row_temperature, temperature, entropy, sum_p2):
    dtype = _result_dtype(logits)
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


@torch.library.register_fake("pykern::linear_token_logprobs")
def _(hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy):
    dtype = _result_dtype(hidden)
    rows = hidden.shape[0]
    return (
        hidden.new_empty((rows,), dtype=dtype),
        hidden.new_empty((rows if entropy else 0,), dtype=dtype),
        hidden.new_empty((rows, 2), dtype=dtype),
    )


@torch.library.register_fake("pykern::linear_token_logprobs_backward")
def _(
    hidden,
    weight,
    targets,
    bias,
    row_temperature,
    temperature,
    softcap,
    statistics,
    entropy,
    grad_logprobs,
    grad_entropy,
    hidden_needs_grad,
    weight_needs_grad,
    bias_needs_grad,
):
    return (
        hidden.new_empty(hidden.shape if hidden_needs_grad else (0,)),
        weight.new_empty(weight.shape if weight_needs_grad else (0,)),
        hidden.new_empty((weight.shape[0] if bias_needs_grad else 0,), dtype=torch.float64),
    )
