"""linear_policy_loss: hidden states to the policy loss and its gradients, the logits made once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from .linear import Head, check_head, head_logprobs, prepared_head, shard_of
from .logprobs_host import can_look_at, check_targets, described, prepared_targets, prepared_temperature
from .loss import policy_loss
from .losses import LOSSES

_FIXED_BYTES = 80 << 20
"""What the products need besides the kept logits and the sums."""

_FEWEST_ROWS = 256
"""A chunk reads the head and its sums several times: with fewer rows recomputing the logits is faster."""

_CHUNK_OPS = ("linear_chunk_logprobs", "linear_chunk_gradients", "policy_loss_forward", "policy_loss_backward")


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss: str = "grpo",
    entropy_coef: float = 0.0,
    process_group: "distributed.ProcessGroup | None" = None,
    vocabulary_start: int | None = None,
    workspace_bytes: int = 512 << 20,
    **keywords: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """policy_loss of the log-probabilities that linear_token_logprobs gives, and where that can be, in one go.

    Where a token's loss depends on no other token's log-probability (a ratio of "token", the row's or as given), the
    gradient of the loss for a log-probability is known as soon as this is. Then a chunk of tokens at a time has its
    logits computed, kept in float32, and turned into their gradient in place: three products of hidden states, logits
    and weight (6 N V H operations) where linear_token_logprobs and policy_loss one after the other take four. This is
    the way for float32 and bfloat16, if a gradient is wanted, without a process_group, and if the workspace has room
    for 80 MiB and either (4 + element size) V bytes for each token, or that for 256 tokens at a time and the sums of
    weight's gradient, 4 V H bytes (none for float32 with H a multiple of 64, and none if weight requires no
    gradient). In all other cases, and under torch.compile, the two functions run one after the other. Both ways are
    exact and agree up to rounding.

    Tokens whose loss has an exactly zero gradient, by their mask, their advantage or a clipped branch, take no part
    in the products for the gradients; those masked, in none. On CUDA, where looking for them would wait for the
    device, they are selected away but cost their share of the products.

    Args:
        hidden: packed [N, H] with cu_seqlens, or padded [B, T, H].
        weight, bias, temperature, softcap, process_group, vocabulary_start: as for linear_token_logprobs, a
            temperature per token of the shape of targets.
        targets: int64 or int32, [N] or [B, T]. A negative target masks its token; the targets of masked tokens are
            not read.
        old_logprobs, advantages, mask, cu_seqlens, loss: as for policy_loss, with targets in place of logprobs.
        entropy_coef: weight of the entropy bonus; the entropy is that of each token's whole distribution.
        workspace_bytes: limit of the memory besides the arguments and their gradients.
        keywords: all others of policy_loss, but entropy and token_weights, whose values arise here.

    Returns:
        loss and metrics as policy_loss. Where the logits are made once, the gradients for a loss of weight 1 are
        computed at once and scaled in the backward, of which there can be one only.

    Raises:
        TypeError, ValueError: an argument of unexpected type, shape or value.
        NotImplementedError: CUDA tensors, where the CUDA kernels are not loaded.
    """
    name = "linear_policy_loss"
    for given in ("entropy", "token_weights"):
        if keywords.get(given) is not None:
            raise ValueError(f"{name}: {given}: expected None, as its values arise here; use entropy_coef or aggregate")
    if not isinstance(hidden, Tensor) or hidden.dim() != (3 if cu_seqlens is None else 2):
        expected = "[B, T, H], or [N, H] with cu_seqlens" if cu_seqlens is None else "[N, H] beside cu_seqlens"
        got = list(hidden.shape) if isinstance(hidden, Tensor) else described(hidden)
        raise ValueError(f"{name}: hidden: expected shape {expected}, got {got}")
    if not (isinstance(workspace_bytes, int) and workspace_bytes >= 0):
        raise ValueError(f"{name}: workspace_bytes: expected an integer of at least 0, got {workspace_bytes!r}")
    shape = hidden.shape[:-1]
    targets = prepared_targets(name, targets, hidden, "hidden", shape)
    hidden = hidden.flatten(0, -2)
    check_head(name, hidden, weight, bias, softcap, *_CHUNK_OPS)
    shard = shard_of(name, process_group, vocabulary_start, weight.shape[0])
    active = targets >= 0
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != shape:
            got = list(mask.shape) if isinstance(mask, Tensor) else described(mask)
            raise ValueError(f"{name}: mask: expected a tensor of the shape of targets, {list(shape)}, got {got}")
        active = active & (mask != 0)
    targets = targets.masked_fill(~active, -100)
    row_temperature, temperature = prepared_temperature(name, temperature, targets)
    row_temperature = None if row_temperature is None else row_temperature.flatten()
    targets = targets.flatten()
    if process_group is None:
        check_targets(name, targets, weight.shape[0])

    def evaluate(logprobs: Tensor, entropies: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(
            logprobs.view(shape),
            old_logprobs,
            advantages,
            mask=active,
            cu_seqlens=cu_seqlens,
            loss=loss,
            entropy=None if entropies is None else entropies.view(shape),
            entropy_coef=entropy_coef,
            **keywords,
        )

    head = prepared_head(hidden, weight, bias, softcap)
    rows = _rows_of_a_chunk(head, workspace_bytes)
    ratio = keywords.get("ratio")
    if (
        loss not in LOSSES
        or (LOSSES[loss].ratio if ratio is None else ratio) != "token"
        or process_group is not None
        or hidden.dtype not in (torch.float32, torch.bfloat16)
        or rows < min(hidden.shape[0], _FEWEST_ROWS)
        or not head.requires_grad()
        or torch.compiler.is_compiling()
    ):
        logprobs, entropies = head_logprobs(head, targets, row_temperature, temperature, bool(entropy_coef), shard)
        return evaluate(logprobs, entropies if entropy_coef else None)
    tokens = _Tokens(targets, row_temperature, temperature, bool(entropy_coef), evaluate, rows)
    value, metrics = _LinearPolicyLoss.apply(head.hidden, head.weight, head.bias, head.softcap, tokens)
    return value, dict(zip(tokens.metrics, metrics.unbind()))


def _rows_of_a_chunk(head: Head, workspace_bytes: int) -> int:
    """A multiple of 64."""
    entries = -(-head.weight.shape[0] // 192) * 192
    per_row = max((4 + head.hidden.element_size()) * entries, 1)

    def fitting(room: int) -> int:
        return max(room // per_row // 64 * 64, 0)

    rows = fitting(workspace_bytes - _FIXED_BYTES)
    if not head.weight.requires_grad or head.hidden.shape[0] <= rows:
        return rows
    sums = _sums_shape(head.weight)
    if sums == head.weight.shape and head.weight.dtype == torch.float32:
        return rows  # They become the gradient.
    return fitting(workspace_bytes - _FIXED_BYTES - 4 * sums[0] * sums[1])


def _sums_shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], -(-weight.shape[1] // 64) * 64


# --- logits made once -----------------------------------------------------------------------------


@dataclass
class _Tokens:
    """What belongs to the tokens, and the loss as a function of all log-probabilities and entropies."""

    targets: Tensor
    row_temperature: Tensor | None
    temperature: float
    entropy: bool
    evaluate: Callable[[Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor]]]
    rows_of_a_chunk: int
    metrics: tuple[str, ...] = ()
    """Their names, once the loss has been evaluated."""

    def coefficients(self, logprobs: Tensor, entropies: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Value, metrics, and the value's gradient for each log-probability and entropy."""
        leaves = [tensor.detach().requires_grad_() for tensor in (logprobs, entropies) if tensor is not None]
        with torch.enable_grad():
            value, metrics = self.evaluate(*leaves, *[None] * (2 - len(leaves)))
        gradients = torch.autograd.grad(value, leaves)
        self.metrics = tuple(metrics)
        return (
            value.detach(),
            torch.stack(tuple(metrics.values())),
            gradients[0],
            gradients[1] if self.entropy else None,
        )


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, softcap, tokens):
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        results = hidden.new_zeros((2, hidden.shape[0]), dtype=torch.float32)
        logprobs, entropies = results[0], results[1] if tokens.entropy else None

        targets = tokens.targets
        active = (targets >= 0).nonzero().squeeze(1) if can_look_at(targets) else None
        whole = active is None or active.shape == targets.shape
        count = targets.shape[0] if whole else active.shape[0]
        # Chunks of about one size.
        chunks = max(-(-count // max(tokens.rows_of_a_chunk, 1)), 1)
        rows_of_a_chunk = max(-(-count // (chunks * 64)) * 64, 64)
        sums = None
        if needs_weight:
            # One chunk alone needs no sums besides its gradient.
            alone = chunks == 1 and weight.dtype != torch.float32
            sums = (
                weight.new_zeros(weight.shape) if alone else weight.new_zeros(_sums_shape(weight), dtype=torch.float32)
            )
        evaluated = None
        logits = hidden.new_empty((rows_of_a_chunk, -(-weight.shape[0] // 192) * 192), dtype=torch.float32)
        for first in range(0, count, rows_of_a_chunk):
            rows = slice(first, min(first + rows_of_a_chunk, count))
            rows = rows if whole else active[rows]
            temperatures = None if tokens.row_temperature is None else tokens.row_temperature[rows]
            given = (hidden[rows], weight, targets[rows], bias, temperatures, tokens.temperature, softcap)
            some, some_entropies, statistics = torch.ops.pykern.linear_chunk_logprobs.default(
                *given, tokens.entropy, logits
            )
            if not can_look_at(targets):
                outside = targets[rows] >= weight.shape[0]
                some, statistics = (
                    some.masked_fill(outside, torch.nan),
                    statistics.masked_fill(outside[:, None], torch.nan),
                )
            logprobs[rows] = some
            if tokens.entropy:
                entropies[rows] = some_entropies
            # Of all tokens, as an aggregate counts them all. Of the coefficients only this chunk's are used: other
            # tokens' log-probabilities, some of them not yet known, have no influence on these.
            evaluated = tokens.coefficients(logprobs, entropies)
            grad_logprobs, grad_entropy = evaluated[2:]
            gradient = torch.ops.pykern.linear_chunk_gradients.default(
                *given,
                statistics,
                some_entropies,
                grad_logprobs[rows],
                grad_entropy[rows] if tokens.entropy else None,
                logits,
                sums,
                grad_bias,
                needs_hidden,
            )
            if needs_hidden:
                grad_hidden[rows] = gradient
        if evaluated is None:
            evaluated = tokens.coefficients(logprobs, entropies)
        if needs_weight:
            sums = sums[:, : weight.shape[1]].to(weight.dtype).contiguous()
        ctx.gradients = (grad_hidden, sums, grad_bias)
        ctx.mark_non_differentiable(evaluated[1])
        return evaluated[0], evaluated[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_policy_loss: the first backward has taken the gradients; for a second one compute the loss "
                "again, or pass workspace_bytes=0"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if not (can_look_at(grad_loss) and grad_loss == 1):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return *gradients, None, None
