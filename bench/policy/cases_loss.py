"""policy_loss against plain PyTorch, and verl where it is installed."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import pykern
from bench.harness import Case

VERL_LOSSES = {"grpo": ("vanilla", "token-mean"), "gspo": ("gspo", "seq-mean-token-mean")}
"""Names and aggregates of the same losses in verl."""


def eager_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, reference: Tensor, loss: str) -> Tensor:
    row, log_ratio, advantage = pykern.LOSSES[loss], logprobs - old, advantages.unsqueeze(1)
    lengths = mask.sum(1)
    if row.ratio == "clipped_sequence":
        sign = advantage.sign()
        log_ratio = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-row.clip_low, row.clip_high))
    if row.ratio != "token":
        log_ratio = ((log_ratio * mask).sum(1) / lengths).unsqueeze(1).expand_as(mask)
    ratio = log_ratio.exp()
    tokens = -advantage * ratio
    if row.ratio != "clipped_sequence":
        tokens = torch.maximum(tokens, -advantage * ratio.clamp(1 - row.clip_low, 1 + row.clip_high))
    distance = logprobs - reference
    tokens = tokens + 0.05 * (torch.exp(-distance) + distance - 1)
    if row.aggregate == "seq-mean-token-mean":
        return ((tokens * mask).sum(1) / lengths).mean()
    return (tokens * mask).sum() / mask.sum()


def verl_step(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, reference: Tensor, loss: str
) -> Callable:
    """verl's loss and its k3 estimate, aggregated, and the gradient."""
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    name, aggregate = VERL_LOSSES[loss]
    row, function = pykern.LOSSES[loss], core_algos.get_policy_loss_fn(name)
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=row.clip_low,
        clip_ratio_high=row.clip_high,
    )  # fmt: skip
    advantages, mask = advantages[:, None].expand(logprobs.shape).contiguous(), mask.float()

    def step():
        value, _ = function(old, logprobs, advantages, mask, aggregate, config)
        estimate = core_algos.kl_penalty(logprobs, reference, "low_var_kl")
        return torch.autograd.grad(value + 0.05 * core_algos.agg_loss(estimate, mask, aggregate), logprobs)

    return step


def loss_and_gradient(rows: int, columns: int, loss: str) -> Callable[[], dict[str, Callable]]:
    def make():
        torch.manual_seed(0)
        logprobs = (-torch.rand(rows, columns)).requires_grad_()
        old, reference = (logprobs.detach() + 0.1 * torch.randn(rows, columns) for _ in range(2))
        advantages, mask = torch.randn(rows), torch.rand(rows, columns) < 0.8

        def pykern_step():
            value, _ = pykern.policy_loss(
                logprobs, old, advantages, mask=mask, loss=loss, kl="k3", kl_coef=0.05, ref_logprobs=reference
            )
            return torch.autograd.grad(value, logprobs)

        def eager_step():
            return torch.autograd.grad(eager_loss(logprobs, old, advantages, mask, reference, loss), logprobs)

        providers = {"pykern": pykern_step, "torch eager": eager_step}
        if loss in VERL_LOSSES and importlib.util.find_spec("verl"):
            providers["verl"] = verl_step(logprobs, old, advantages, mask, reference, loss)
        return providers

    return make


def loss_alone(rows: int, columns: int, loss: str, per_token: bool) -> Callable[[], dict[str, Callable]]:
    """The loss with what its backward needs, as one reads it: no KL estimate, no backward."""

    def make():
        torch.manual_seed(0)
        logprobs = (-torch.rand(rows, columns)).requires_grad_()
        old = logprobs.detach() + 0.1 * torch.randn(rows, columns)
        advantages = torch.randn(rows, columns) if per_token else torch.randn(rows)
        mask = torch.arange(columns) < torch.randint(columns // 2, columns + 1, (rows, 1))
        return {"pykern": lambda: pykern.policy_loss(logprobs, old, advantages, mask=mask, loss=loss)}

    return make


def cases(device: str) -> list[Case]:
    # A batch of a CPU's time, and 134 million tokens; and one that fits a cache, as large as a small batch is.
    rows, columns = (16384, 8192) if device == "cuda" else (256, 1024)
    listed = []
    large, small = (rows, columns), (64, 1024)
    for loss, (height, width) in (("grpo", small), ("gspo", small), ("grpo", large), ("gspo", large), ("gmpo", large)):
        # Three inputs and a mask byte read, the coefficient written, read and scaled into the gradient.
        moved = 25.0 * height * width
        shape, make = f"{height}x{width}", loss_and_gradient(height, width, loss)
        listed.append(Case("policy", f"policy_loss {loss}", shape, make, bytes=moved))
    for loss, per_token in (("grpo", False), ("grpo", True), ("gspo", False)):
        # Two inputs and a mask byte read, the coefficient written.
        moved = (17.0 if per_token else 13.0) * rows * columns
        shape = f"{rows}x{columns} {'token' if per_token else 'sequence'} advantages"
        make = loss_alone(rows, columns, loss, per_token)
        listed.append(Case("policy", f"policy_loss_forward {loss}", shape, make, bytes=moved))
    return listed
