"""The ops of policy_loss: gradient, fake kernels, and what each token counts in an aggregate."""

import torch

from .losses import METRICS

BEFORE_ENTROPY = 10
"""The op's arguments between the log-probabilities and the entropy."""


class PolicyLoss(torch.autograd.Function):
    """(loss, metrics) of policy_loss_forward; gradients for logprobs and entropy, which have the forward's type."""

    @staticmethod
    def forward(ctx, logprobs, entropy, *constants):
        value, coefficient, entropy_coefficient, metrics = torch.ops.pykern.policy_loss_forward.default(
            logprobs, *constants[:BEFORE_ENTROPY], entropy, *constants[BEFORE_ENTROPY:], True
        )
        ctx.save_for_backward(coefficient, entropy_coefficient)
        ctx.mark_non_differentiable(metrics)
        ctx.constants = len(constants)
        return value, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        scaled = torch.ops.pykern.policy_loss_backward.default
        gradients = (
            scaled(grad_loss, coefficient) if needed else None
            for coefficient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad)
        )
        return *gradients, *([None] * ctx.constants)


@torch.library.register_fake("pykern::policy_loss_forward")
def _policy_loss_forward_fake(
    logprobs, old_logprobs, advantages, mask, cu_seqlens, keep, ref_logprobs, anchor_logprobs, anchor_keep,
    rollout_logprobs, rollout_weights, entropy, clip_low, clip_high, second_advantages, advantage_weights,
    token_weights, choices, settings, with_gradient,
):  # fmt: skip
    return (
        logprobs.new_empty(()),
        torch.empty_like(logprobs) if with_gradient else logprobs.new_empty(0),
        torch.empty_like(logprobs) if with_gradient and entropy is not None else logprobs.new_empty(0),
        logprobs.new_empty(len(METRICS)),
    )


@torch.library.register_fake("pykern::policy_loss_backward")
def _policy_loss_backward_fake(grad_loss, coefficient):
    return torch.empty_like(coefficient)


@torch.library.register_fake("pykern::policy_loss_token_weights")
def _policy_loss_token_weights_fake(logprobs, mask, cu_seqlens, aggregate, count_empty, denominator, horizon):
    return torch.empty_like(logprobs)
