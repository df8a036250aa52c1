"""Batches for the policy_loss tests, and its definition under the names of the public function."""

import math

import torch

import pykern
from pykern.policy.loss import PRESETS
from pykern.reference import policy_loss as reference


def batch(rows=5, columns=37, dtype=torch.float64, *, spread=0.4, per_token=False, poisoned=True):
    """A padded batch. Masked places hold garbage; the second row is masked whole."""
    mask = torch.rand(rows, columns) < 0.7
    if rows > 1:
        mask[1] = False
    logprobs = -torch.rand(rows, columns, dtype=torch.float64) * 3
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + spread * torch.randn(rows, columns),
        "advantages": torch.randn(rows, columns) if per_token else torch.randn(rows),
        "ref_logprobs": logprobs + 0.5 * torch.randn(rows, columns),
        "rollout_logprobs": logprobs + 0.8 * torch.randn(rows, columns),
    }
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(dtype)
        if poisoned and tensor.shape == mask.shape:
            garbage = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)[torch.randint(0, 3, mask.shape)]
            tensors[name] = torch.where(mask, tensors[name], garbage)
    return tensors | {"mask": mask}


def packed(tensors: dict) -> dict:
    """The same batch without its padding; per-token advantages stay per token."""
    mask = tensors["mask"]
    lengths = mask.sum(dim=1)
    result = {name: tensor[mask] if tensor.shape == mask.shape else tensor for name, tensor in tensors.items()}
    result["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    del result["mask"]
    return result


def arguments(tensors: dict, *, kl=None, rollout=False, **keywords) -> tuple[tuple, dict]:
    """Positional and keyword arguments of pykern.policy_loss."""
    positional = tuple(tensors[name] for name in ("logprobs", "old_logprobs", "advantages"))
    named = {name: tensors[name] for name in ("mask", "cu_seqlens") if name in tensors}
    if kl is not None:
        named |= {"kl": kl, "kl_coef": 0.3, "ref_logprobs": tensors["ref_logprobs"]}
    if rollout:
        named["rollout_logprobs"] = tensors["rollout_logprobs"]
    return positional, named | keywords


def definition(positional: tuple, named: dict, dtype=torch.float64):
    """Loss, metrics and gradient of the definition, computed in `dtype`."""
    named = dict(named)
    row, limits = pykern.LOSSES[named.pop("loss", "grpo")], PRESETS[named.pop("preset", None)]
    parts = {
        "ratio": row.ratio,
        "clip": row.clip,
        "clip_low": row.clip_low,
        "clip_high": row.clip_high,
        "dual_clip": limits.dual_clip or row.dual_clip,
        "aggregate": row.aggregate,
        "log_ratio_limit": limits.log_ratio,
        "sequence_log_ratio_limit": limits.sequence_log_ratio,
        "kl_log_ratio_limit": limits.kl_log_ratio,
        "kl_limit": limits.kl,
    }
    if row.ratio == "sequence" or row.clip == "weight":
        parts["dual_clip"] = row.dual_clip
    parts |= {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in named.items()
    }
    logprobs, old, advantages = (tensor.detach().to(dtype) for tensor in positional)
    logprobs = logprobs.clone().requires_grad_()
    loss, metrics = reference.policy_loss(logprobs, old, advantages, **parts)
    (gradient,) = torch.autograd.grad(loss, logprobs, allow_unused=True)
    return loss.detach(), metrics, torch.zeros_like(logprobs) if gradient is None else gradient


def ours(positional: tuple, named: dict):
    """Loss, metrics and gradient of pykern.policy_loss."""
    logprobs = positional[0].detach().clone().requires_grad_()
    loss, metrics = pykern.policy_loss(logprobs, *positional[1:], **named)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), metrics, logprobs.grad
