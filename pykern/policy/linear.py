"""Log-probabilities of given tokens straight from hidden states and the output head."""

import math

import torch
from torch import Tensor

from .logprobs_host import check_floating, described, prepared_targets, prepared_temperature, result_dtype


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
    check_floating(name, "hidden", hidden)
    check_floating(name, "weight", weight)
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
    targets = prepared_targets(name, targets, hidden, "hidden", hidden.shape[:1], weight.shape[0])
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError(f"{name}: bias: expected a floating-point tensor or None, got {described(bias)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
        if bias.device != hidden.device:
            raise ValueError(f"{name}: bias: expected on {hidden.device}, got on {bias.device}; move it there")
        bias = bias.to(torch.float64).contiguous()
    row_temperature, temperature = prepared_temperature(name, temperature, targets)
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
        results = torch.ops.pykern.linear_token_logprobs.default(*arguments, 0)
    return (results[0], results[1]) if entropy else results[0]


# --- gradients -------------------------------------------------------------------------------------


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy):
        ctx.set_materialize_grads(False)
        logprobs, entropies, statistics = torch.ops.pykern.linear_token_logprobs.default(
            hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy, 0
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
            0,
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


# --- shapes for tracing ----------------------------------------------------------------------------


@torch.library.register_fake("pykern::linear_token_logprobs")
def _(hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy, vocabulary_start):
    dtype = result_dtype(hidden)
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
    vocabulary_start,
    hidden_needs_grad,
    weight_needs_grad,
    bias_needs_grad,
):
    return (
        hidden.new_empty(hidden.shape if hidden_needs_grad else (0,)),
        weight.new_empty(weight.shape if weight_needs_grad else (0,)),
        hidden.new_empty((weight.shape[0] if bias_needs_grad else 0,), dtype=torch.float64),
    )
