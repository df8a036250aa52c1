"""What runs along sequences, against loops over tokens and groups: PyTorch's, and verl's where it is installed."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import pykern
from bench.harness import Case
from pykern.reference import policy_risk


def loop_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A few operations on all sequences for each token, from the right."""
    zero = torch.zeros_like(rewards[:, 0])
    next_value, next_advantage, columns = zero, zero, []
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_value = torch.where(counts, values[:, t], next_value)
        next_advantage = torch.where(counts, advantage, next_advantage)
        columns.append(next_advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def scan(rows: int, columns: int, what: str) -> Callable[[], dict[str, Callable]]:
    def make():
        torch.manual_seed(0)
        rewards, values = torch.randn(rows, columns), torch.randn(rows, columns)
        mask = torch.arange(columns) < torch.randint(columns // 2, columns + 1, (rows, 1))
        if what == "discounted_returns":
            return {"pykern": lambda: pykern.discounted_returns(rewards, gamma=0.99, mask=mask)}
        providers = {
            "pykern": lambda: pykern.gae(rewards, values, gamma=0.99, lam=0.95, mask=mask, whiten=True),
            "torch loop": lambda: loop_gae(rewards, values, mask, 0.99, 0.95),
        }
        if importlib.util.find_spec("verl"):
            from verl.trainer.ppo import core_algos

            numbers = mask.to(rewards.dtype)
            providers["verl"] = lambda: core_algos.compute_gae_advantage_return(rewards, values, numbers, 0.99, 0.95)
        return providers

    return make


def whiten(rows: int, columns: int) -> Callable[[], dict[str, Callable]]:
    def make():
        torch.manual_seed(0)
        values = torch.randn(rows, columns)
        mask = torch.arange(columns) < torch.randint(columns // 2, columns + 1, (rows, 1))

        def eager():
            count = mask.sum()
            mean = (values * mask).sum() / count
            variance = ((values - mean).square() * mask).sum() / (count - 1)
            return (values - mean) * torch.rsqrt(variance + 1e-8) * mask

        return {"pykern": lambda: pykern.masked_whiten(values, mask), "torch eager": eager}

    return make


def token_baseline(rows: int, columns: int) -> Callable[[], dict[str, Callable]]:
    def make():
        torch.manual_seed(0)
        rewards, logprobs, sum_p2 = torch.randn(rows, columns), -torch.rand(rows, columns), torch.rand(rows, columns)
        ids = torch.arange(rows) // 8
        mask = torch.arange(columns) < torch.randint(columns // 2, columns + 1, (rows, 1))

        def pykern_step():
            returns = pykern.discounted_returns(rewards, mask=mask)
            return pykern.optimal_token_baseline(returns, logprobs, sum_p2, ids, mask=mask)

        providers = {"pykern": pykern_step}
        if importlib.util.find_spec("verl"):
            from verl.trainer.ppo import core_algos

            numbers, labels = mask.to(rewards.dtype), ids.cpu().numpy()
            function = core_algos.compute_optimal_token_baseline_advantage
            providers["verl"] = lambda: function(rewards, numbers, labels, logprobs, sum_p2)
        return providers

    return make


def risk(samples: int, responses: int, in_bundle: int) -> Callable[[], dict[str, Callable]]:
    """RiskPO, of which no library has more than a loop over bundles and papers; the definition is one over bundles."""

    def make():
        torch.manual_seed(0)
        groups = (torch.arange(samples) // responses)[torch.randperm(samples)]
        rewards = torch.rand(samples)
        return {
            "pykern": lambda: pykern.risk_advantages(rewards, groups, groups // in_bundle),
            "torch loop": lambda: policy_risk.risk_advantages(rewards, groups, groups // in_bundle),
        }

    return make


def cases(device: str) -> list[Case]:
    rows, columns = (16384, 8192) if device == "cuda" else (256, 8192)
    shape, tokens = f"{rows}x{columns}", float(rows * columns)
    return [
        # Rewards, values and a mask byte read, both results written; whitening reads twice and writes once more.
        Case("policy", "gae", shape, scan(rows, columns, "gae"), bytes=31 * tokens),
        Case("policy", "discounted_returns", shape, scan(rows, columns, "discounted_returns"), bytes=9 * tokens),
        Case("policy", "masked_whiten", shape, whiten(rows, columns), bytes=14 * tokens),
        # The scan of the returns; then three inputs and a mask byte read for the sums, and again for the advantages.
        Case("policy", "optimal_token_baseline", shape, token_baseline(rows, columns), bytes=39 * tokens),
        Case("policy", "risk_advantages", "16384 in 1024, 5 to a bundle", risk(16384, 16, 5), bytes=28.0 * 16384),
    ]
