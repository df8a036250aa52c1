"""Discriminative policy losses: scores of whole sequences, correct ones above wrong ones of their group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _native
from .checks import (
    check_device,
    check_floats,
    check_group_ids,
    check_like,
    checked_flags,
    checked_offsets,
    constant,
    lookup,
)

SCORES = ("ratio", "log")
"""A sequence's score, the mean over its tokens of exp(logprob - old_logprob), or of logprob."""

NEGATIVES = ("dro", "mean")
"""How the scores of a group's wrong responses become one: tau log mean exp(score / tau), or their mean."""

POSITIVES = ("uniform", "length")
"""How those of its correct ones do: their mean, or with weights exp((1 - L / max_length) / length_temperature)."""

DIVERGENCES = ("k3", "k1")
"""Of the policy from the old one, with d = logprob - old_logprob: exp(d) - d - 1, or -d; the mean over all tokens."""

METRICS = (
    "policy_loss",
    "penalty",
    "kl",
    "constraint_violated",
    "groups",
    "mixed_groups",
    "positive_score",
    "negative_score",
)


@dataclass(frozen=True)
class DiscoLoss:
    """A row of DISCO_LOSSES: the defaults of disco_loss's keywords of the same names."""

    score: str
    negatives: str
    positives: str
    tau: float
    paper: str
    beta: float = 1e3
    delta: float = 1e-4
    length_temperature: float = 0.1


DISCO_LOSSES: dict[str, DiscoLoss] = {
    "disco": DiscoLoss("log", "dro", "uniform", 10.0, "arXiv 2505.12366"),
    "disco_ratio": DiscoLoss("ratio", "dro", "uniform", 1.0, "arXiv 2505.12366"),
    "discob": DiscoLoss("log", "mean", "uniform", 10.0, "arXiv 2505.12366"),
    "discob_ratio": DiscoLoss("ratio", "mean", "uniform", 1.0, "arXiv 2505.12366"),
    "drpo": DiscoLoss("log", "dro", "length", 10.0, "arXiv 2510.04474"),
}


def disco_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    rewards: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss: str = "disco",
    score: str | None = None,
    negatives: str | None = None,
    positives: str | None = None,
    tau: float | None = None,
    beta: float | None = None,
    delta: float | None = None,
    length_temperature: float | None = None,
    max_length: float | None = None,
    divergence: str = "k3",
    published: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DisCO and DRPO: the loss to minimise, and metrics; the gradient comes out of the same call.

    With s_i the score of response i, correct where its reward is 1 and wrong where it is 0, over the G groups

        loss = -1/G sum_g [ sum_{i correct in g} w_i s_i - tau log mean_{j wrong in g} exp(s_j / tau) ]
               + beta / 2 max(KL - delta, 0)^2

    with w_i = 1 / (number of correct ones), or for positives="length" proportional to exp((1 - L_i / max_length) /
    length_temperature); negatives="mean" has the mean of s_j instead of the logarithm. A group that lacks one of the
    classes adds nothing, but counts in G. KL is the mean over all unmasked tokens, of all sequences.

    The papers' code has the same gradient and another value: E / (E + eps) in place of the logarithm, E being the sum
    of exp((s_j - max s) / tau), and beta max(KL - delta, 0) KL as the penalty; `published=True` returns it. Its
    functions, by row: compute_policy_loss_disco_logL is "disco", _disco_Lratio "disco_ratio" (which its trainer
    doesn't call), _discob_logL "discob", _discob_Lratio "discob_ratio", compute_policy_loss_drpo "drpo"; kl_type
    "low_var_kl" is divergence "k3", "kl" is "k1". Those need groups of one size, and responses that aren't empty.

    Groups may be of any sizes, their ids in any order. A response without tokens, or whose reward is neither 0 nor 1,
    is neither correct nor wrong. Masked tokens may hold anything: their gradient is exactly 0. Sums run in float64 in
    an order that no thread decides. On a GPU each sequence looks at all others, so the work grows with B^2.

    Args:
        logprobs: of the taken tokens under the policy, the only input that receives a gradient: padded [B, T], or
            packed [N] with cu_seqlens.
        old_logprobs: of the shape of logprobs; None stands for logprobs, detached.
        rewards: [B], floating-point.
        group_ids: [B] integers; equal ids make a group.
        mask: of the shape of logprobs; a token counts where it is not 0. None: all tokens.
        cu_seqlens: [B + 1] integers from 0 to N, the packed sequences' bounds; on a GPU not checked.
        loss: a row of DISCO_LOSSES, which holds what is not given here.
        score, negatives, positives, divergence: of SCORES, NEGATIVES, POSITIVES, DIVERGENCES.
        tau, length_temperature: positive. beta, delta: of the constraint KL <= delta; beta=0 takes it away.
        max_length: the longest response allowed, T by default; needed by positives="length" of packed tokens.
        published: the value as in the papers' code.

    Returns:
        The loss, a scalar (float64 for float64, else float32), and scalars: "policy_loss" and "penalty", which add up
        to it, "kl", "constraint_violated" (1 where KL > delta), "groups", "mixed_groups" (with both classes), the
        mean scores "positive_score" and "negative_score".

    Raises:
        TypeError, ValueError: naming the argument.
    """
    row = lookup(DISCO_LOSSES, loss, "loss")
    score = row.score if score is None else score
    negatives = row.negatives if negatives is None else negatives
    positives = row.positives if positives is None else positives
    for name, choice, table in (
        ("score", score, SCORES),
        ("negatives", negatives, NEGATIVES),
        ("positives", positives, POSITIVES),
        ("divergence", divergence, DIVERGENCES),
    ):
        if choice not in table:
            raise ValueError(f"{name}: expected one of {', '.join(table)}, got {choice!r}")
    # Where another score is chosen than the row's, the temperature goes with it.
    tau = (row.tau if score == row.score else {"ratio": 1.0, "log": 10.0}[score]) if tau is None else tau
    length_temperature = row.length_temperature if length_temperature is None else length_temperature
    beta, delta = row.beta if beta is None else beta, row.delta if delta is None else delta
    for name, number in (("tau", tau), ("length_temperature", length_temperature)):
        if not number > 0:
            raise ValueError(f"{name}: expected a positive number, got {number!r}")
    for name, number in (("beta", beta), ("delta", delta)):
        if not number >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {number!r}")
    check_floats(logprobs, "logprobs")
    cu_seqlens, sequences = checked_offsets(cu_seqlens, logprobs, "logprobs")
    if old_logprobs is None:
        old_logprobs = logprobs
    check_floats(old_logprobs, "old_logprobs")
    check_like(old_logprobs, "old_logprobs", logprobs, "logprobs")
    check_floats(rewards, "rewards")
    if list(rewards.shape) != [sequences]:
        raise ValueError(f"rewards: expected one per sequence, [{sequences}], got {list(rewards.shape)}")
    check_device(rewards, "rewards", logprobs, "logprobs")
    check_group_ids(group_ids, "group_ids", sequences, "sequence")
    check_device(group_ids, "group_ids", logprobs, "logprobs")
    if max_length is None:
        if cu_seqlens is not None and positives == "length":
            raise ValueError("max_length: positives='length' of packed sequences needs the longest response allowed")
        max_length = max(logprobs.shape[-1], 1)
    if not max_length > 0:
        raise ValueError(f"max_length: expected a positive number of tokens, got {max_length!r}")
    flags = checked_flags(mask, "mask", logprobs, "logprobs")
    _native.require_kernels(logprobs, "logprobs", "disco_loss_forward")

    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    constants = (
        old_logprobs.detach().to(dtype).contiguous(),
        rewards.detach().to(dtype).contiguous(),
        group_ids.to(torch.int64).contiguous(),
        flags,
        cu_seqlens,
        SCORES.index(score),
        NEGATIVES.index(negatives),
        POSITIVES.index(positives),
        DIVERGENCES.index(divergence),
        published,
        [float(tau), float(beta), float(delta), float(length_temperature), float(max_length)],
    )
    if torch.is_grad_enabled() and logprobs.requires_grad:
        value, metrics = _DiscoLoss.apply(logprobs.to(dtype).contiguous(), *constants)
    else:
        value, _, metrics = torch.ops.pykern.disco_loss_forward.default(constant(logprobs), *constants, False)
    return value, dict(zip(METRICS, metrics.unbind()))


class _DiscoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, *constants):
        value, coefficient, metrics = torch.ops.pykern.disco_loss_forward.default(logprobs, *constants, True)
        ctx.save_for_backward(coefficient)
        ctx.mark_non_differentiable(metrics)
        ctx.constants = len(constants)
        return value, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        (coefficient,) = ctx.saved_tensors
        return grad_loss * coefficient, *([None] * ctx.constants)


@torch.library.register_fake("pykern::disco_loss_forward")
def _disco_loss_forward_fake(
    logprobs, old_logprobs, rewards, group_ids, mask, cu_seqlens, score, negatives, positives, divergence, published,
    settings, with_gradient,
):  # fmt: skip
    coefficient = torch.empty_like(logprobs) if with_gradient else logprobs.new_empty(0)
    return logprobs.new_empty(()), coefficient, logprobs.new_empty(len(METRICS))
