"""group_advantages against plain PyTorch, and verl where it is installed."""

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


def entropy(samples: int, groups: int) -> Callable[[], dict[str, Callable]]:
    def make():
        torch.manual_seed(0)
        ids = (torch.arange(samples) % groups)[torch.randperm(samples)]
        answers = torch.randint(0, 5, (samples,))
        zeros = torch.zeros(groups, dtype=torch.float64)

        def unique() -> Tensor:
            pairs, count = torch.stack([ids, answers], dim=1).unique(dim=0, return_counts=True)
            share = count.double() / torch.bincount(ids)[pairs[:, 0]]
            return zeros.index_add(0, pairs[:, 0], -share * share.log2())[ids]

        return {"pykern": lambda: pykern.group_entropy(ids, answers), "torch unique": unique}

    return make


def statistics(samples: int, groups: int) -> Callable[[], dict[str, Callable]]:
    """Beside the function of verl that pykern.integrations.verl has on it."""

    def make():
        torch.manual_seed(0)
        ids = (torch.arange(samples) % groups)[torch.randperm(samples)]
        values = torch.rand(samples)
        providers = {"pykern": lambda: pykern.group_statistics(values, ids)}
        if importlib.util.find_spec("verl"):
            from verl.utils import group_mean_std

            providers["verl group_mean_std"] = lambda: group_mean_std(values, ids, device=values.device)
        return providers

    return make


def cases(device: str) -> list[Case]:
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
    listed.append(Case("policy", "group_entropy", "16384 in 1024", entropy(16384, 1024), bytes=32.0 * 16384))
    listed.append(Case("policy", "group_statistics", "16384 in 1024", statistics(16384, 1024), bytes=28.0 * 16384))
    return listed
