"""Presets against the formulas of their projects, written out for groups of one size that lie together."""

import pytest
import torch

import pykern

GROUPS, SIZE = 12, 8


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(GROUPS, SIZE, dtype=torch.float64), torch.arange(GROUPS).repeat_interleave(SIZE)


def check(preset: str, estimator: str, rewards: torch.Tensor, ids: torch.Tensor, want: torch.Tensor, **keywords):
    flat = rewards.reshape(GROUPS * SIZE, -1).squeeze(1)
    actual = pykern.group_advantages(flat, ids, estimator=estimator, preset=preset, **keywords)
    torch.testing.assert_close(actual, want.reshape(-1), rtol=1e-9, atol=1e-9)
    single = pykern.group_advantages(flat.float(), ids, estimator=estimator, preset=preset, **keywords)
    torch.testing.assert_close(single.double(), want.reshape(-1), rtol=1e-6, atol=1e-6)
    if preset not in ("roll", "slime"):  # whose numbers are the default
        plain = pykern.group_advantages(flat, ids, estimator=estimator, **keywords)
        assert (plain - actual).abs().max() > 1e-9


def spread(rewards: torch.Tensor, **keywords) -> torch.Tensor:
    return rewards.std(dim=1, keepdim=True, **keywords)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("preset, eps", [("openrlhf", 1e-9), ("oat", 1e-8), ("roll", 1e-6), ("slime", 1e-6)])
def test_group_normalisation(preset, eps):
    rewards, ids = batch()
    check(preset, "grpo", rewards, ids, (rewards - rewards.mean(1, keepdim=True)) / (spread(rewards) + eps))


@pytest.mark.usefixtures("everywhere")
def test_trl():
    rewards, ids = batch()
    centred = rewards - rewards.mean(1, keepdim=True)
    check("trl", "grpo", rewards, ids, centred / (spread(rewards) + 1e-4))
    check("trl", "lite_ppo", rewards, ids, centred / (rewards.std() + 1e-4))


@pytest.mark.usefixtures("everywhere")
def test_trl_of_reward_functions_without_an_opinion():
    rewards, ids = torch.rand(GROUPS, SIZE, 2, dtype=torch.float64), batch()[1]
    rewards[torch.rand(GROUPS, SIZE, 2) < 0.2] = float("nan")
    rewards[:, :3] = torch.rand(GROUPS, 3, 2, dtype=torch.float64)
    rewards[2, 5] = float("nan")
    unscorable, weights = rewards.isnan().all(dim=2), torch.tensor([1.0, 0.5], dtype=torch.float64)

    def deviation(values: torch.Tensor, dim: int) -> torch.Tensor:
        distance = values - values.nanmean(dim, keepdim=True)
        present = (~values.isnan()).sum(dim, keepdim=True)
        return (distance.square().nansum(dim, keepdim=True) / (present - 1)).sqrt()

    total = (rewards * weights).nansum(dim=2).masked_fill(unscorable, float("nan"))
    want = (total - total.nanmean(1, keepdim=True)) / (deviation(total, 1) + 1e-4)
    check("trl", "grpo", rewards, ids, want.nan_to_num(0), component_weights=[1.0, 0.5])

    apart = (rewards - rewards.nanmean(1, keepdim=True)) / (deviation(rewards, 1) + 1e-4)
    total = (apart * weights).nansum(dim=2).masked_fill(unscorable, float("nan")).flatten()
    want = (total - total.nanmean()) / (deviation(total, 0) + 1e-4)
    check("trl", "gdpo", rewards, ids, want.nan_to_num(0), component_weights=[1.0, 0.5])


def leave_one_out(rewards: torch.Tensor, eps: float) -> torch.Tensor:
    n = rewards.shape[1]
    mean = (rewards.sum(1, keepdim=True) - rewards) / (n - 1)
    squares = (rewards.square().sum(1, keepdim=True) - rewards.square()) / (n - 1)
    return (rewards - mean) / (((squares - mean.square()) * (n - 1) / (n - 2)).sqrt() + eps)


@pytest.mark.usefixtures("everywhere")
def test_nemo():
    rewards, ids = batch()
    check("nemo", "grpo", rewards, ids, leave_one_out(rewards, 1e-6))
    components = torch.stack([rewards, rewards.roll(3, dims=1).square()], dim=2)
    total = sum(leave_one_out(components[..., c], 1e-6) for c in range(2))
    check("nemo", "gdpo", components, ids, (total - total.mean()) / total.std())


@pytest.mark.usefixtures("everywhere")
def test_prime_rl():
    rewards, ids = batch()
    mean = rewards.mean(1, keepdim=True)
    check("prime_rl", "grpo", rewards, ids, rewards - mean)
    check("prime_rl", "maxrl", rewards, ids, (rewards - mean) / mean)
    lengths = torch.randint(1, 50, (GROUPS, SIZE))
    shaped = rewards - mean * 0.3 * lengths / lengths.max(1, keepdim=True).values
    keywords = {"transform": "relative_length", "relative_length": 0.3, "lengths": lengths.flatten()}
    check("prime_rl", "grpo", rewards, ids, shaped - shaped.mean(1, keepdim=True), **keywords)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("preset, correction, eps", [("openrlhf", 0, 1e-8), ("verl", 1, 1e-8)])
def test_whitening_over_tokens(preset, correction, eps):
    rewards, ids = batch()
    lengths = torch.randint(1, 9, (GROUPS * SIZE,))
    centred = (rewards - rewards.mean(1, keepdim=True)).flatten()
    tokens = centred.repeat_interleave(lengths)
    want = (centred - tokens.mean()) / (tokens.var(correction=correction) + eps).sqrt()
    actual = pykern.group_advantages(
        rewards.flatten(), ids, estimator="reinforce_pp_baseline", preset=preset, lengths=lengths
    )
    torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-9)
