"""Log-probabilities of given tokens straight from hidden states and the output head."""

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, distributed

from .logprobs_host import (
    can_look_at,
    check_floating,
    check_targets,
    described,
    prepared_targets,
    prepared_temperature,
    result_dtype,
)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    process_group: "distributed.ProcessGroup | None" = None,
    vocabulary_start: int | None = None,
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
        process_group: where the output head is split by vocabulary entries, the processes that hold its shards. Each
            passes the same hidden states, targets and temperature and its own rows of weight and bias, in the order
            of the ranks; every one gets the log-probabilities of the whole vocabulary, the gradient of its own
            shard, and, given the same gradient of the results, the whole gradient of `hidden`. One all-gather of
            four numbers per token and shard, merged in the order of the ranks; in the backward one all-reduce.
        vocabulary_start: with a process_group, the vocabulary entry that this shard begins with. By default the
            shards are of one size: rank * weight.shape[0].

    Returns:
        logprobs [N], float32 (float64 for float64 inputs); with `entropy` the pair (logprobs, entropy).

    Products of bfloat16 are taken in bfloat16 where the processor has them, with float32 sums; all
    other math is in float32, also for float16. Gradients are accumulated in float32 and have the
    dtypes of their tensors. Results and gradients are the same bit for bit for any number of threads.
    Workspace: in the forward one copy of `hidden` and at most 400 bytes per token; in the backward two
    copies of `hidden`, its gradient in float32, and about 80 MiB plus H KiB per thread, whatever V.

    On CUDA the products are those of torch.mm, over chunks of the vocabulary; their sums stay float32, so that
    logits of bfloat16 and float16 are not rounded either. For the same shapes results and gradients are the same
    bit for bit. Rows that take no part cost their share of the products. Workspace: at most 320 MiB up to 200,000
    tokens, and in the backward a copy of `hidden` and its gradient in float32.

    A target past the vocabulary, or shards with gaps or overlaps, are refused on the CPU. On CUDA, where looking
    would wait for the device, and in compiled code the log-probabilities and gradients concerned are NaN.

    Raises:
        TypeError, ValueError: an argument of unexpected type, shape or value.
        NotImplementedError: CUDA tensors, where the CUDA kernels are not loaded.
    """
    name = "linear_token_logprobs"
    check_head(name, hidden, weight, bias, softcap)
    targets = prepared_targets(name, targets, hidden, "hidden", hidden.shape[:1])
    shard = shard_of(name, process_group, vocabulary_start, weight.shape[0])
    if process_group is None:
        check_targets(name, targets, weight.shape[0])
    temperatures = prepared_temperature(name, temperature, targets)
    results = head_logprobs(prepared_head(hidden, weight, bias, softcap), targets, *temperatures, entropy, shard)
    return (results[0], results[1]) if entropy else results[0]


# --- arguments ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """Hidden states and the output head as the ops take them: contiguous rows, bias in float64, softcap 0 for none."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float

    def requires_grad(self) -> bool:
        leaves = (self.hidden, self.weight, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)


def check_head(
    function: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, *ops: str
) -> None:
    """Of hidden [N, H] and what applies to any rows of it; `ops` are what `function` calls besides."""
    kernels = ("linear_token_logprobs", "linear_token_logprobs_backward", *ops)
    check_floating(function, "hidden", hidden, *kernels)
    check_floating(function, "weight", weight, *kernels)
    if hidden.dim() != 2:
        raise ValueError(
            f"{function}: hidden: expected shape [N, H], got {list(hidden.shape)}; flatten leading dimensions"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{function}: weight: expected shape [V, {hidden.shape[1]}], got {list(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{function}: weight: expected the dtype of hidden, {hidden.dtype}, got {weight.dtype}; cast one of them"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{function}: weight: expected on {hidden.device}, got on {weight.device}; move one of them")
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError(f"{function}: bias: expected a floating-point tensor or None, got {described(bias)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{function}: bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
        if bias.device != hidden.device:
            raise ValueError(f"{function}: bias: expected on {hidden.device}, got on {bias.device}; move it there")
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"{function}: softcap: expected a positive finite number or None, got {softcap!r}")


def prepared_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Head:
    if hidden.shape[1] > 1:
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.to(torch.float64).contiguous()
    return Head(hidden, weight, bias, 0.0 if softcap is None else float(softcap))


def head_logprobs(
    head: Head, targets: Tensor, row_temperature: Tensor | None, temperature: float, entropy: bool, shard: "Shard"
) -> tuple[Tensor, Tensor]:
    """logprobs [N] and entropy [N or 0]."""
    arguments = (head.hidden, head.weight, targets, head.bias, row_temperature, temperature, head.softcap)
    function = _LinearTokenLogprobs.apply if head.requires_grad() else _forward
    return function(*arguments, entropy, shard)[:2]


# --- shards of the vocabulary ---------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """Vocabulary entries from `start` on; without a group the whole vocabulary."""

    group: "distributed.ProcessGroup | None"
    start: int


def shard_of(function: str, group: object, start: int | None, entries: int) -> Shard:
    if group is None:
        if start is not None:
            raise ValueError(f"{function}: vocabulary_start: expected None without a process_group, got {start!r}")
        return Shard(None, 0)
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"{function}: process_group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
        )
    if start is None:
        start = distributed.get_rank(group) * entries
    if not isinstance(start, int) or start < 0:
        raise ValueError(f"{function}: vocabulary_start: expected an integer of 0 or more, got {start!r}")
    return Shard(group, start)


def _forward(hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy, shard):
    """logprobs [N], entropy [N or 0] and statistics [N, 2] of the whole vocabulary."""
    logprobs, entropies, statistics = torch.ops.pykern.linear_token_logprobs.default(
        hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy, shard.start
    )
    if shard.group is not None:
        return _merged(logprobs, entropies, statistics, targets, row_temperature, temperature, shard, weight.shape[0])
    if not can_look_at(targets):
        outside = targets >= weight.shape[0]
        logprobs = logprobs.masked_fill(outside, math.nan)
        statistics = statistics.masked_fill(outside.unsqueeze(1), math.nan)
    return logprobs, entropies, statistics


def _merged(logprobs, entropies, statistics, targets, row_temperature, temperature, shard, entries):
    """The results of the whole vocabulary from those of every shard, in float64 and in the order of the ranks."""
    rows, shards = targets.shape[0], distributed.get_world_size(shard.group)
    # Per token largest logit, log of the sum, entropy, and the target's logit as a logarithm relative to the largest;
    # in the last row the shard itself.
    message = logprobs.new_zeros((rows + 1, 4), dtype=torch.float64)
    message[:rows, :2] = statistics
    if entropies.shape == targets.shape:
        message[:rows, 2] = entropies
    message[:rows, 3] = logprobs.double() + statistics[:, 1]
    message[rows, 0], message[rows, 1] = shard.start, entries
    gathered = message.new_empty((shards, rows + 1, 4))
    distributed.all_gather(list(gathered.unbind(0)), message, group=shard.group)
    largest, log_sum, entropy, target = gathered[:, :rows].unbind(2)
    starts = gathered[:, rows, 0]
    ends = starts + gathered[:, rows, 1]
    complete = (starts == torch.cat((starts.new_zeros(1), ends[:-1]))).all()
    if can_look_at(targets):
        if not complete:
            bounds = ", ".join(f"[{int(a)}, {int(b)})" for a, b in zip(starts, ends))
            raise ValueError(
                "linear_token_logprobs: vocabulary_start: expected shards that follow each other from 0 on in the "
                f"order of the ranks, got {bounds}; pass vocabulary_start where the shards differ in size"
            )
        check_targets("linear_token_logprobs", targets, int(ends[-1]))

    inverse = 1 / temperature if row_temperature is None else 1 / row_temperature
    top = largest.amax(0)
    shift = (largest - top) * inverse
    log_weight = shift + log_sum
    total = _sum_of_shards((log_weight - log_weight.amax(0)).exp()).log() + log_weight.amax(0)
    log_share = log_weight - total
    share = log_share.exp()
    # Entropy of the choice of a shard, and that within it; a shard without probability has no entropy, not even NaN.
    merged_entropy = _sum_of_shards(torch.where(share == 0, 0.0, share * (entropy - log_share)))
    hit = (targets >= starts.unsqueeze(1)) & (targets < ends.unsqueeze(1))
    # Where all entries of a shard are -inf, its target is, too, though relative to -inf it was NaN.
    target = torch.where(log_sum == -math.inf, -math.inf, target + shift)
    merged = _sum_of_shards(torch.where(hit, target, 0.0)) - total
    missing = ~(hit.any(0) & complete)
    active = targets >= 0

    def chosen(values: Tensor) -> Tensor:
        return torch.where(active, values.masked_fill(missing, math.nan), 0.0).to(logprobs.dtype)

    return (
        chosen(merged),
        chosen(merged_entropy) if entropies.shape == targets.shape else entropies,
        torch.stack((chosen(top), chosen(total)), dim=1),
    )


def _sum_of_shards(values: Tensor) -> Tensor:
    """Over the first dimension, in order: the same bits on every process."""
    return reduce(torch.add, values.unbind(0))


# --- gradients ------------------------------------------------------------------------------------


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy, shard):
        ctx.set_materialize_grads(False)
        logprobs, entropies, statistics = _forward(
            hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy, shard
        )
        ctx.save_for_backward(hidden, weight, targets, bias, row_temperature, statistics, entropies)
        ctx.temperature, ctx.softcap, ctx.shard = temperature, softcap, shard
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
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
            ctx.shard.start,
            needs_hidden,
            needs_weight,
            needs_bias,
        )
        if needs_hidden and ctx.shard.group is not None:
            # Each shard's part is rounded to the dtype of hidden once; their sum is not rounded at every step.
            whole = grad_hidden.to(result_dtype(grad_hidden))
            distributed.all_reduce(whole, group=ctx.shard.group)
            grad_hidden = whole.to(grad_hidden.dtype)
        return (
            grad_hidden if needs_hidden else None,
            grad_weight if needs_weight else None,
            None,
            grad_bias if needs_bias else None,
            None,
            None,
            None,
            None,
            None,
        )


# --- shapes for tracing ----------------------------------------------------------------------------


def _row_results(hidden: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and statistics."""
    rows, dtype = hidden.shape[0], result_dtype(hidden)
    return (
        hidden.new_empty((rows,), dtype=dtype),
        hidden.new_empty((rows if entropy else 0,), dtype=dtype),
        hidden.new_empty((rows, 2), dtype=dtype),
    )


@torch.library.register_fake("pykern::linear_token_logprobs")
def _(hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy, vocabulary_start):
    return _row_results(hidden, entropy)


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


@torch.library.register_fake("pykern::linear_chunk_logprobs")
def _(hidden, weight, targets, bias, row_temperature, temperature, softcap, entropy, logits):
    return _row_results(hidden, entropy)


@torch.library.register_fake("pykern::linear_chunk_gradients")
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
    logits,
    weight_sums,
    bias_sums,
    hidden_needs_grad,
):
    return hidden.new_empty((hidden.shape[0] if hidden_needs_grad else 0, hidden.shape[1]))
