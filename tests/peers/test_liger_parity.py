"""linear_policy_loss and linear_token_logprobs against liger-kernel's chunked GRPO loss and fused head, on the CPU."""

import itertools

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

import pykern

ROWS, COLUMNS, WIDTH, VOCABULARY, LONGEST = 5, 13, 16, 61, 20

# What liger's loss_type means here; its sums over tokens are divided by the number of unmasked ones.
LOSSES = {
    "grpo": {"loss": "grpo", "aggregate": "seq-mean-token-mean", "count_empty": True},
    "bnpo": {"loss": "grpo", "aggregate": "token-mean"},
    "dr_grpo": {"loss": "dr_grpo", "horizon": LONGEST, "count_empty": True},
    "dapo": {"loss": "grpo", "aggregate": "token-mean"},
    "cispo": {"loss": "cispo", "aggregate": "token-mean"},
    "sapo": {"loss": "sapo", "count_empty": True},
    "vespo": {"loss": "vespo", "aggregate": "token-mean"},
    "luspo": {"loss": "luspo", "count_empty": True},
}


def batch():
    hidden, weight = torch.randn(ROWS, COLUMNS, WIDTH), torch.randn(VOCABULARY, WIDTH) * 0.3
    targets = torch.randint(0, VOCABULARY, (ROWS, COLUMNS))
    mask = (torch.rand(ROWS, COLUMNS) < 0.7).float()
    mask[1] = 0
    logprobs = torch.log_softmax(hidden @ weight.T, dim=-1).gather(-1, targets[..., None]).squeeze(-1)
    old, reference = (logprobs + 0.3 * torch.randn(ROWS, COLUMNS) for _ in range(2))
    return hidden, weight, targets, mask, torch.randn(ROWS), old, reference


def accepted(loss_type, level, beta, delta, correct_kl):
    """Whether liger takes these together and means something by each of them."""
    clips = loss_type not in ("cispo", "sapo", "vespo")
    if loss_type == "luspo" and (level == "token" or beta):
        return False  # it spreads what is per token over the whole batch
    return (clips or level == "token" and not delta) and bool(beta or not correct_kl)


CASES = [
    case
    for case in itertools.product(LOSSES, ("token", "sequence"), (0.0, 0.1), (None, 1.1), (False, True))
    if accepted(*case)
]


@pytest.mark.parametrize("loss_type, level, beta, delta, correct_kl", CASES)
def test_grpo(loss_type, level, beta, delta, correct_kl):
    by_sequence = level == "sequence"
    hidden, weight, targets, mask, advantages, old, reference = batch()
    low, high = (3e-2, 4e-2) if by_sequence else (0.2, 0.28)
    high = 1.2 if loss_type == "cispo" else high
    peer = LigerFusedLinearGRPOLoss(
        beta=beta, compiled=False, use_ref_model=beta != 0.0, epsilon_low=low, epsilon_high=high, loss_type=loss_type,
        max_completion_length=LONGEST, importance_sampling_level=level, delta=delta, temperature=0.9,
        use_bias_correction_kl=correct_kl,
    )  # fmt: skip
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs, _ = peer(
        x, w, targets, mask, advantages, ref_per_token_logps=reference if beta else None, old_per_token_logps=old
    )
    theirs.backward()

    keywords = dict(LOSSES[loss_type])
    if loss_type == "cispo":
        keywords["clip_high"] = high - 1
    elif loss_type not in ("sapo", "vespo"):
        keywords |= {"clip_low": low, "clip_high": high, "ratio": level}
        if delta:
            keywords["ratio_limit"] = delta
    if beta:
        keywords |= {"kl": "k3", "kl_coef": beta, "ref_logprobs": reference}
        keywords["kl_gradient"] = "importance" if correct_kl else "value"
    y, v = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ours, _ = pykern.linear_policy_loss(y, v, targets, old, advantages, mask=mask, temperature=0.9, **keywords)
    ours.backward()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-6)
    for own, other in ((y.grad, x.grad), (v.grad, w.grad)):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scaled_cross_entropy(temperature):
    hidden, weight = torch.randn(33, WIDTH), torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(0, VOCABULARY, (33,))
    targets[::5] = -100
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(x, w, targets, temperature, -100, 1, True)
    (loss.sum() + 0.3 * entropy[targets >= 0].sum()).backward()
    y, v = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, own_entropy = pykern.linear_token_logprobs(y, v, targets, temperature=temperature, entropy=True)
    (-logprobs.sum() + 0.3 * own_entropy.sum()).backward()
    torch.testing.assert_close(logprobs, -loss, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(own_entropy[targets >= 0], entropy[targets >= 0], rtol=1e-5, atol=1e-5)
    for own, other in ((y.grad, x.grad), (v.grad, w.grad)):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
