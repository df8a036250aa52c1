"""What runs along sequences against the verl package, on the CPU: returns, generalised advantages, whitening, and the
optimal token baseline. At masked tokens verl's advantages hold what passes them; ours are 0."""

import pytest
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional

import pykern


def batch(dtype, mask: str, rows=48, columns=90):
    """Ragged groups in no order, one of one sample; probabilities of a small vocabulary."""
    kept = torch.arange(columns) < torch.randint(columns // 3, columns + 1, (rows, 1))
    if mask == "turns":
        kept = torch.rand(rows, columns // 10).gt(0.3).repeat_interleave(10, dim=1)
        kept[:, :10] = True
    ids = torch.randint(0, 7, (rows,))
    ids[-1] = 99
    logprobs = torch.randn(rows, columns, 30, dtype=dtype).mul(2).log_softmax(-1)
    rewards, values = (torch.randn(rows, columns, dtype=dtype) for _ in range(2))
    return rewards, values, kept, ids, logprobs[..., 0], logprobs.exp().square().sum(-1)


def assert_same(ours, theirs):
    # verl adds up in the tensors' own type, tokens by the hundred.
    tolerance = 1e-6 if ours.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


pytestmark = [
    pytest.mark.parametrize("dtype", [torch.float32, torch.float64]),
    pytest.mark.parametrize("mask", ["tail", "turns"]),
]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.97, 0.9), (0.9, 0.0)])
def test_gae(gamma, lam, mask, dtype):
    rewards, values, kept, *_ = batch(dtype, mask)
    numbers = kept.to(dtype)
    advantages, returns = core_algos.compute_gae_advantage_return(rewards, values, numbers, gamma, lam)
    ours = pykern.gae(rewards, values, gamma=gamma, lam=lam, mask=kept, whiten=True)
    assert_same(ours[0][kept], advantages[kept])
    assert_same(ours[1][kept], returns[kept])


@pytest.mark.parametrize("gamma", [1.0, 0.95])
def test_reinforce_plus_plus(gamma, mask, dtype):
    rewards, _, kept, *_ = batch(dtype, mask)
    function = core_algos.get_adv_estimator_fn("reinforce_plus_plus")
    advantages, returns = function(rewards, kept.to(dtype), config=AlgoConfig(gamma=gamma))
    ours = pykern.discounted_returns(rewards, gamma=gamma, mask=kept)
    assert_same(ours, returns)
    assert_same(pykern.masked_whiten(ours, kept), advantages)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten(shift_mean, mask, dtype):
    values, _, kept, *_ = batch(dtype, mask)
    theirs = torch_functional.masked_whiten(values, kept.to(dtype), shift_mean)
    assert_same(pykern.masked_whiten(values, kept, shift_mean=shift_mean)[kept], theirs[kept])


@pytest.mark.parametrize("zero_tail", [True, False])
@pytest.mark.parametrize("align", pykern.ALIGNMENTS)
@pytest.mark.parametrize("weighted", [True, False])
def test_optimal_token_baseline(weighted, align, zero_tail, mask, dtype):
    rewards, _, kept, ids, logprobs, sum_p2 = batch(dtype, mask)
    weights = torch.rand_like(rewards) * 2 if weighted else None
    name = "optimal_token_baseline" if align == "position" else "tir_optimal_token_baseline"
    theirs, returns = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=rewards,
        response_mask=kept.to(dtype),
        index=ids.numpy(),
        old_log_probs=logprobs,
        sum_pi_squared=sum_p2,
        rollout_is_weights=weights,
        handle_zero_tail=zero_tail,
    )
    ours = pykern.discounted_returns(rewards, mask=kept)
    assert_same(ours[kept], returns[kept])
    advantages = pykern.optimal_token_baseline(
        ours, logprobs, sum_p2, ids, mask=kept, importance_weights=weights, align=align, zero_tail=zero_tail,
        singleton="self",
    )  # fmt: skip
    assert_same(advantages, theirs)
