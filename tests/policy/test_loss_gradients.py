"""Gradients of policy_loss against differences of its value."""

import pytest
import torch

import pykern
from pykern.policy.losses import AGGREGATES, KL_ESTIMATORS
from tests.policy.loss_cases import arguments, batch, ours

# Rules whose value differs from what they differentiate: a weight is a constant.
DIFFERENTIABLE = [name for name, row in pykern.LOSSES.items() if row.rule in ("clip", "log", "gate")]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize(
    "kl, gradient", [(None, "value"), *((k, g) for k in KL_ESTIMATORS for g in ("value", "importance"))]
)
@pytest.mark.parametrize("loss", DIFFERENTIABLE)
def test_gradcheck(loss, kl, gradient, aggregate):
    tensors = batch(3, 4, poisoned=False, spread=0.1)
    extra = ("entropy",) if kl == "k3" else ()
    positional, named = arguments(
        tensors, loss=loss, kl=kl, kl_gradient=gradient, rollout=kl == "k1", aggregate=aggregate, extra=extra
    )
    leaves = [positional[0].clone().requires_grad_()]
    if extra:
        leaves.append(named.pop("entropy").clone().requires_grad_())

    def function(logprobs, entropy=None):
        return pykern.policy_loss(logprobs, *positional[1:], entropy=entropy, **named)[0]

    assert torch.autograd.gradcheck(function, leaves, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("kl", [None, *KL_ESTIMATORS])
@pytest.mark.parametrize("loss", ["cispo", "cispo_relative", "topr", "topr_token", "dppo_tv"])
def test_gradcheck_of_weights_that_are_held(loss, kl, aggregate):
    """A weight is a constant of the ratio; with all ratios clipped it is one in truth, and differences show it."""
    tensors = batch(3, 5, poisoned=False)
    tensors["old_logprobs"] = tensors["logprobs"] - 2
    named = {"stabilisation_low": 9.0, "stabilisation_high": 9.0} if loss == "dppo_tv" else {}
    positional, named = arguments(tensors, loss=loss, kl=kl, aggregate=aggregate, clip_high=0.5, **named)
    logprobs = positional[0].clone().requires_grad_()
    function = lambda logprobs: pykern.policy_loss(logprobs, *positional[1:], **named)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (logprobs,), eps=1e-7, atol=1e-6)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("loss", ["grpo", "gspo", "gmpo", "sapo"])
def test_gradient_of_ratios_and_entropy_by_hand(loss):
    """One sequence, one token moved: the loss moves by the gradient, entropy by minus its coefficient's share."""
    tensors = batch(2, 6, poisoned=False, spread=0.05)
    tensors["mask"] = torch.ones(2, 6, dtype=torch.bool)
    positional, named = arguments(tensors, loss=loss, extra=("entropy",), aggregate="seq-mean-token-mean")
    value, _, gradient, of_entropy = ours(positional, named)
    torch.testing.assert_close(of_entropy, torch.full_like(of_entropy, -0.05 / 12))
    step = 1e-6 * torch.randn(2, 6, dtype=torch.float64)
    moved = ours((positional[0] + step, *positional[1:]), named)[0]
    torch.testing.assert_close(moved - value, (step * gradient).sum(), rtol=1e-4, atol=1e-12)


@pytest.mark.usefixtures("everywhere")
def test_only_the_entropy_may_need_a_gradient():
    positional, named = arguments(batch(poisoned=False), extra=("entropy",))
    entropy = named.pop("entropy").requires_grad_()
    loss, _ = pykern.policy_loss(*positional, entropy=entropy, **named)
    (gradient,) = torch.autograd.grad(loss, entropy)
    expected = ours(positional, named | {"entropy": entropy.detach()})[3]
    assert torch.equal(gradient, expected)
