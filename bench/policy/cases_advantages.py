"""group_advantages and policy_loss against plain PyTorch, and verl where it is installed."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import pykern
from bench.harness import Case


def index_add_advantages(rewards: Tensor, ids: Tensor) -> Tensor:
    """The vectorised PyTorch way: find the groups, then two index_add_ passes."""
    _, index = ids.unique(return_inverse=True)
    count = torch.bincount(index).to(rewards.dtype)
    mean = torch.zeros_like(count).index_add_(0, index, rewards) / count
    centred = rewards - mean[index]
    variance = torch.zeros_like(count).index_add_(0, index, centred.square()) / (count - 1)
    return centred / (variance.sqrt()[index] + 1e-6)


def advantages(samples: int, groups: int) -> Callable[[], dict[str, Callable]]:
    def make():
        torch.manual_seed(0)
        ids = (torch.arange(samples) % groups)[torch.randperm(samples)]
        rewards = torch.rand(samples)
        providers = {
            "pykern": lambda: pykern.group_advantages(rewards, ids, preset="verl"),
            "torch index_add": lambda: index_add_advantages(rewards, ids),
        }
        if importlib.util.find_spec("verl"):
            from verl.trainer.ppo import core_algos

            one_token, mask, labels = rewards[:, None], torch.ones(samples, 1), ids.cpu().numpy()
            for name in ("grpo", "grpo_vectorized"):
                function = core_algos.get_adv_estimator_fn(name)
                providers[f"verl {name}"] = lambda function=function: function(one_token.clone(), mask, labels)
        return providers

    return make


def any_estimator(samples: int, groups: int, estimator: str, verl: str | None) -> Callable[[], dict[str, Callable]]:
    """Beside verl's function of this name."""

    def make():
        torch.manual_seed(0)
        ids = (torch.arange(samples) % groups)[torch.randperm(samples)]
        rewards, lengths = torch.rand(samples), torch.randint(1, 9, (samples,))
        components = torch.stack([rewards, rewards.square()], dim=1) if estimator == "gdpo" else rewards
        providers = {"pykern": lambda: pykern.group_advantages(components, ids, estimator=estimator, lengths=lengths)}
        if verl and importlib.util.find_spec("verl"):
            from verl.trainer.ppo import core_algos

            mask = (torch.arange(8, device=lengths.device) < lengths[:, None]).float()
            tokens, labels = torch.zeros_like(mask), ids.cpu().numpy()
            tokens[:, 0] = rewards
            function = core_algos.get_adv_estimator_fn(verl)
            providers[f"verl {verl}"] = lambda: function(tokens.clone(), mask, labels)
        return providers

    return make


def eager_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, reference: Tensor, loss: str) -> Tensor:
    log_ratio = logprobs - old
    if loss == "gspo":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1)).unsqueeze(1).expand_as(mask)
    low, high = pykern.LOSSES[loss].clip_low, pykern.LOSSES[loss].clip_high
    ratio, advantage = log_ratio.exp(), advantages.unsqueeze(1)
    tokens = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    distance = logprobs - reference
    tokens = tokens + 0.05 * (torch.exp(-distance) + distance - 1)
    if loss == "gspo":
        return ((tokens * mask).sum(1) / mask.sum(1)).mean()
    return (tokens * mask).sum() / mask.sum()


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

        return {"pykern": pykern_step, "torch eager": eager_step}

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
    # A batch of a CPU's time, and 134 million tokens.
    rows, columns = (16384, 8192) if device == "cuda" else (256, 1024)
    listed = [
        Case("policy", "group_advantages", f"{samples} in {groups}", advantages(samples, groups), bytes=20.0 * samples)
        for samples, groups in ((1024, 128), (16384, 1024))
    ]
    for estimator, verl in (
        ("rloo", "rloo_vectorized"),
        ("opo", "opo"),
        ("reinforce_pp_baseline", "reinforce_plus_plus_baseline"),
        ("grpo_leave_one_out", None),
        ("hapo", None),
        ("bnpo", None),
        ("gdpo", None),
    ):
        make = any_estimator(16384, 1024, estimator, verl)
        moved = 28.0 * 16384 + (4.0 * 16384 if estimator == "gdpo" else 0)
        listed.append(Case("policy", f"group_advantages {estimator}", "16384 in 1024", make, bytes=moved))
    for loss in ("grpo", "gspo"):
        # Three inputs and a mask byte read, the coefficient written, read and scaled into the gradient.
        moved = 25.0 * rows * columns
        shape = f"{rows}x{columns}"
        listed.append(Case("policy", f"policy_loss {loss}", shape, loss_and_gradient(rows, columns, loss), bytes=moved))
    for loss, per_token in (("grpo", False), ("grpo", True), ("gspo", False)):
        # Two inputs and a mask byte read, the coefficient written.
        moved = (17.0 if per_token else 13.0) * rows * columns
        shape = f"{rows}x{columns} {'token' if per_token else 'sequence'} advantages"
        make = loss_alone(rows, columns, loss, per_token)
        listed.append(Case("policy", f"policy_loss_forward {loss}", shape, make, bytes=moved))
    return listed
