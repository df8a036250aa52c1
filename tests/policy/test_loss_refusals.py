"""What policy_loss and its helpers refuse, each with its message."""

import pytest
import torch

import pykern


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logprobs": 1.0}, TypeError, "logprobs: expected a floating-point tensor, got float"),
        ({"logprobs": torch.zeros(3)}, ValueError, r"logprobs: expected \[B, T\], got \[3\]; packed .* cu_seqlens"),
        ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs: .* \[2, 3\], got \[2, 4\]"),
        ({"old_logprobs": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "old_logprobs: .* got torch.int64"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages: .* \[2\], or per token, \[2, 3\], got \[3\]"),
        ({"mask": torch.ones(3, 2)}, ValueError, r"mask: expected the shape of logprobs, \[2, 3\]"),
        ({"mask": [1]}, TypeError, "mask: expected a tensor, got list"),
        ({"loss": "grop"}, ValueError, "loss: expected one of ppo, .* got 'grop'"),
        ({"aggregate": "mean"}, ValueError, "aggregate: expected one of token-mean, .* got 'mean'"),
        ({"kl": "k4", "ref_logprobs": torch.zeros(2, 3)}, ValueError, "kl: expected None or one of k1, k2, k3"),
        ({"kl": "k3"}, ValueError, "ref_logprobs: kl='k3' needs"),
        ({"kl_coef": 0.1}, ValueError, "kl: expected one of k1, k2, k3, abs beside"),
        ({"clip_low": -0.1}, ValueError, "clip_low: .* got -0.1"),
        ({"clip_high": float("nan")}, ValueError, "clip_high: .* got nan"),
        ({"clip_high": -0.1}, ValueError, "clip_high: .* at least 0, got -0.1"),
        ({"clip_high": -1.1, "loss": "cispo"}, ValueError, "clip_high: .* at least -1, got -1.1"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip: expected a ratio above 1"),
        ({"kl": "k3", "ref_logprobs": torch.zeros(2, 3), "kl_gradient": "k2"}, ValueError, "kl_gradient: .* got 'k2'"),
        ({"dual_clip": 3.0, "loss": "cispo"}, ValueError, "dual_clip: loss 'cispo' has no place for it"),
        ({"ratio_limit": 0.0}, ValueError, "ratio_limit: expected a positive ratio"),
        ({"ratio_limit": 4.0, "loss": "sapo"}, ValueError, "ratio_limit: loss 'sapo' has no place for it"),
        ({"clip_low": 0.1, "loss": "reinforce"}, ValueError, "clip_low: loss 'reinforce' clips no ratio"),
        ({"clip_low": torch.zeros(2)}, ValueError, r"clip_low: expected the shape of logprobs, \[2, 3\], got \[2\]"),
        ({"temperatures": (1.0, 1.0)}, ValueError, "temperatures: loss 'grpo' has no place for it"),
        ({"temperatures": (1.0, 0.0), "loss": "sapo"}, ValueError, "temperatures: expected two positive numbers"),
        ({"temperatures": 1.0, "loss": "sapo"}, ValueError, "temperatures: expected 2 numbers, .* got 1.0"),
        ({"taper": ((1.0, 2.0),), "loss": "vespo"}, ValueError, "taper: expected two pairs"),
        ({"taper": (1.0, 2.0), "loss": "vespo"}, ValueError, r"taper: expected 2 numbers, \(power, rate\), got 1.0"),
        ({"negative_scale": -1.0}, ValueError, "negative_scale: expected a factor"),
        ({"stabilisation_low": 0.1}, ValueError, "stabilisation_low, stabilisation_high: loss 'grpo' drops no tokens"),
        ({"stabilisation_high": -0.1, "loss": "dppo_tv"}, ValueError, "stabilisation_low, .* expected at least 0"),
        ({"keep": torch.ones(3)}, ValueError, r"keep: expected the shape of logprobs, \[2, 3\]"),
        ({"second_advantages": torch.ones(2)}, ValueError, "second_advantages: expected beside advantage_weights"),
        (
            {"second_advantages": torch.ones(2), "advantage_weights": torch.ones(2), "loss": "gmpo"},
            ValueError,
            "second_advantages: loss 'gmpo' takes one advantage",
        ),
        ({"loss": "copo"}, ValueError, "second_advantages: loss 'copo' needs it: the advantages of whole groups"),
        ({"loss": "kdrl"}, ValueError, "anchor_logprobs: loss 'kdrl' needs it: the teacher's"),
        ({"loss": "clip_cov"}, ValueError, "keep: loss 'clip_cov' needs it: .* pykern.clip_cov_mask"),
        ({"loss": "kl_cov"}, ValueError, "anchor_keep: loss 'kl_cov' needs it: .* pykern.kl_cov_mask"),
        ({"loss": "hapo"}, ValueError, "clip_low: loss 'hapo' needs it: .* pykern.hapo_modulation"),
        ({"loss": "dro"}, ValueError, "anchor_coef: loss 'dro' has no default"),
        ({"anchor": "k9"}, ValueError, "anchor: expected None or one of k1, .* got 'k9'"),
        ({"anchor": "k2", "anchor_coef": 0.1}, ValueError, "anchor_logprobs: anchor='k2' needs"),
        ({"anchor_coef": 0.1}, ValueError, "anchor: expected one of k1, .* beside anchor_logprobs"),
        ({"entropy_coef": 0.1}, ValueError, "entropy: entropy_coef needs it"),
        ({"entropy": torch.zeros(3)}, ValueError, r"entropy: expected the shape of logprobs"),
        (
            {"token_weights": torch.zeros(2, 3), "aggregate": "token-sum"},
            ValueError,
            "token_weights: they take the place",
        ),
        ({"rollout_rule": "drop"}, ValueError, "rollout_rule: expected one of truncate, mask"),
        ({"rollout_low": 3.0}, ValueError, "rollout_low: expected a weight from 0 to rollout_clip"),
        ({"rollout_weights": torch.zeros(3)}, ValueError, r"rollout_weights: expected one per sequence, \[2\]"),
        ({"rollout_clip": 0.0}, ValueError, "rollout_clip: expected a positive weight"),
        ({"denominator": 0}, ValueError, "denominator: expected a positive count"),
        ({"horizon": -1}, ValueError, "horizon: expected a positive number"),
        ({"preset": "nobody"}, ValueError, "preset: expected one of None, verl, trl"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens: .* got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: .* padded .* take a mask"),
    ],
)
def test_refuses(change, error, message):
    named = {"logprobs": torch.zeros(2, 3), "old_logprobs": torch.zeros(2, 3), "advantages": torch.zeros(2)} | change
    positional = [named.pop(name) for name in ("logprobs", "old_logprobs", "advantages")]
    with pytest.raises(error, match=message):
        pykern.policy_loss(*positional, **named)


@pytest.mark.parametrize("offsets", [[0, 4, 3], [1, 3], [0, 2], [0, 3, 2, 3]])
def test_refuses_offsets_that_do_not_cover(offsets):
    logprobs = torch.zeros(3)
    with pytest.raises(RuntimeError, match="cu_seqlens: expected"):
        pykern.policy_loss(logprobs, logprobs, logprobs, cu_seqlens=torch.tensor(offsets))


def test_refuses_a_missing_horizon():
    logprobs = torch.zeros(3)
    with pytest.raises(ValueError, match="horizon: .* packed sequences needs it"):
        pykern.policy_loss(logprobs, logprobs, logprobs, cu_seqlens=torch.tensor([0, 3]), loss="dr_grpo")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logprobs": torch.zeros(3)}, ValueError, r"logprobs: expected \[B, T\], got \[3\]; packed .* cu_seqlens"),
        ({"logprobs": 1.0}, TypeError, "logprobs: expected a floating-point tensor"),
        ({"aggregate": "mean"}, ValueError, "aggregate: expected one of token-mean"),
        ({"mask": torch.ones(2)}, ValueError, "mask: expected the shape of logprobs"),
        ({"logprobs": torch.zeros(3), "cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens: expected a tensor of int"),
        (
            {"logprobs": torch.zeros(3), "cu_seqlens": torch.tensor([0, 3]), "aggregate": "seq-mean-token-sum-norm"},
            ValueError,
            "horizon: .* packed sequences needs it",
        ),
    ],
)
def test_token_weights_refuse(change, error, message):
    named = {"logprobs": torch.zeros(2, 3)} | change
    with pytest.raises(error, match=message):
        pykern.policy_loss_token_weights(named.pop("logprobs"), **named)


def test_helpers_refuse():
    with pytest.raises(TypeError, match="entropies: expected a floating-point tensor, got torch.int64"):
        pykern.copo_weights(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"advantages: expected the shape of entropies, \[3\], got \[2\]"):
        pykern.copo_weights(torch.zeros(3), advantages=torch.zeros(2))
    with pytest.raises(ValueError, match="step: expected"):
        pykern.annealed_coef(-1, 10)
    with pytest.raises(ValueError, match="steps: expected"):
        pykern.annealed_coef(1, 0)
