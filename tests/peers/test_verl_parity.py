"""group_advantages and policy_loss with preset="verl" against the verl package, on the CPU."""

import numpy as np
import pytest
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

import pykern

ESTIMATORS = {
    "grpo": ("grpo", {}),
    "grpo_vectorized": ("grpo", {}),
    "dr_grpo": ("dr_grpo", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("rloo", {}),
    "opo": ("opo", {}),
    "remax": ("remax", {}),
    "reinforce_plus_plus": ("reinforce_pp", {}),
    "reinforce_plus_plus_baseline": ("reinforce_pp_baseline", {}),
}


def batch(dtype=torch.float32, rows=96, columns=24):
    """Ragged groups in no order, two of one sample; a reward at each response's last token."""
    ids = torch.cat([torch.randint(0, 14, (rows - 2,)), torch.tensor([90, 91])])
    lengths = torch.randint(1, columns + 1, (rows,))
    mask = (torch.arange(columns) < lengths[:, None]).to(dtype)
    rewards = torch.rand(rows).to(dtype)
    token_rewards = torch.zeros(rows, columns, dtype=dtype)
    token_rewards[torch.arange(rows), lengths - 1] = rewards
    return rewards, token_rewards, mask, ids, lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("peer", ESTIMATORS)
def test_advantages(peer, dtype):
    name, keywords = ESTIMATORS[peer]
    rewards, token_rewards, mask, ids, lengths = batch(dtype)
    greedy = torch.rand(len(ids)).to(dtype)
    function = core_algos.get_adv_estimator_fn("grpo" if peer == "dr_grpo" else peer)
    arguments = {"token_level_rewards": token_rewards.clone(), "response_mask": mask, **keywords}
    if peer == "remax":
        arguments["reward_baselines"] = greedy
    elif peer == "reinforce_plus_plus":
        arguments["config"] = AlgoConfig(gamma=1.0)
    else:
        arguments["index"] = ids.numpy().astype(np.int64)
    expected, _ = function(**arguments)
    ours = pykern.group_advantages(
        rewards,
        ids,
        estimator=name,
        preset="verl",
        lengths=lengths,
        baseline_rewards=greedy if peer == "remax" else None,
    )
    torch.testing.assert_close(ours[:, None] * mask, expected, rtol=1e-6, atol=2e-6 if dtype == torch.float32 else 1e-6)


def logprob_batch(spread, rows=7, columns=19):
    mask = (torch.rand(rows, columns) < 0.7).double()
    mask[0] = 1
    logprobs = -3 * torch.rand(rows, columns, dtype=torch.float64)
    old = logprobs + spread * torch.randn(rows, columns)
    advantages = torch.randn(rows, dtype=torch.float64)
    return logprobs.requires_grad_(), old, advantages, mask


def verl_loss(name, logprobs, old, advantages, mask, aggregate, low, high, weights=None):
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=low, clip_ratio_high=high
    )
    function = core_algos.get_policy_loss_fn(name)
    return function(old, logprobs, advantages[:, None].expand_as(mask), mask, aggregate, config, weights)


@pytest.mark.parametrize("spread", [0.3, 12.0])
@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("peer, loss", [("vanilla", "dapo"), ("gspo", "gspo"), ("cispo", "cispo")])
def test_policy_loss(peer, loss, aggregate, spread):
    logprobs, old, advantages, mask = logprob_batch(spread)
    theirs, metrics = verl_loss(peer, logprobs, old, advantages, mask, aggregate, 0.2, 0.28)
    (gradient,) = torch.autograd.grad(theirs, logprobs)
    ours, own = pykern.policy_loss(
        logprobs,
        old,
        advantages,
        mask=mask,
        loss=loss,
        clip_low=0.2,
        clip_high=0.28,
        aggregate=aggregate,
        preset="verl",
    )
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-6, atol=1e-12)
    assert own["clip_fraction"].item() == pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-6)
    assert own["dual_clip_fraction"].item() == pytest.approx(metrics["actor/pg_clipfrac_lower"], rel=1e-6)
    if peer != "gspo":
        assert own["approx_kl"].item() == pytest.approx(metrics["actor/ppo_kl"], rel=1e-6)


@pytest.mark.parametrize("spread", [0.3, 12.0])
@pytest.mark.parametrize("kl", pykern.KL_ESTIMATORS)
def test_kl(kl, spread):
    logprobs, reference, advantages, mask = logprob_batch(spread)
    theirs = core_algos.agg_loss(core_algos.kl_penalty(logprobs, reference, kl), mask, "seq-mean-token-mean")
    (gradient,) = torch.autograd.grad(theirs, logprobs)
    zero = torch.zeros_like(advantages)
    ours, metrics = pykern.policy_loss(
        logprobs, None, zero, mask=mask, kl=kl, kl_coef=1.0, ref_logprobs=reference, aggregate="seq-mean-token-mean",
        preset="verl",
    )  # fmt: skip
    ours.backward()
    torch.testing.assert_close(metrics["kl_loss"], theirs.detach(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-6, atol=1e-12)


def test_truncated_importance_sampling():
    logprobs, old, advantages, mask = logprob_batch(0.3)
    rollout = old + torch.randn_like(old)
    weights = torch.exp(old - rollout).clamp(max=2.0)
    theirs, _ = verl_loss("vanilla", logprobs, old, advantages, mask, "token-mean", 0.2, 0.2, weights)
    ours, _ = pykern.policy_loss(logprobs, old, advantages, mask=mask, rollout_logprobs=rollout, preset="verl")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
