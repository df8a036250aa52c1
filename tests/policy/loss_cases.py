"""Batches for the policy_loss tests, and its definition under the names of the public function."""

import math

import torch

import pykern
from pykern.policy.losses import PRESETS, Limits, Loss
from pykern.reference import policy_loss as reference

TOKENS = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "anchor_logprobs")
FLAGS = ("keep", "anchor_keep")


def batch(rows=5, columns=37, dtype=torch.float64, *, spread=0.4, per_token=False, poisoned=True):
    """A padded batch with every input. Masked places hold garbage; the second row is masked whole."""
    mask = torch.rand(rows, columns) < 0.7
    if rows > 1:
        mask[1] = False
    logprobs = -torch.rand(rows, columns, dtype=torch.float64) * 3
    size = (rows, columns) if per_token else (rows,)
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + spread * torch.randn(rows, columns),
        "advantages": torch.randn(size),
        "ref_logprobs": logprobs + 0.5 * torch.randn(rows, columns),
        "rollout_logprobs": logprobs + 0.8 * torch.randn(rows, columns),
        "anchor_logprobs": logprobs + 0.5 * torch.randn(rows, columns),
        "second_advantages": torch.randn(size),
        "advantage_weights": torch.rand(size),
        "rollout_weights": 2 * torch.rand(size),
        "entropy": 2 * torch.rand(rows, columns),
        "clip_low": 0.5 * torch.rand(rows, columns),
        "clip_high": 0.5 * torch.rand(rows, columns),
        "token_weights": torch.rand(rows, columns) / 10,
    }
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(dtype)
        if poisoned and tensor.shape == mask.shape:
            garbage = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)[torch.randint(0, 3, mask.shape)]
            tensors[name] = torch.where(mask, tensors[name], garbage)
    return tensors | {"mask": mask} | {name: torch.rand(rows, columns) < 0.7 for name in FLAGS}


def packed(tensors: dict) -> dict:
    """The same batch without its padding; per-token advantages stay per token."""
    mask = tensors["mask"]
    lengths = mask.sum(dim=1)
    result = {name: tensor[mask] if tensor.shape == mask.shape else tensor for name, tensor in tensors.items()}
    result["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    del result["mask"]
    return result


def arguments(tensors: dict, *, kl=None, rollout=False, extra: tuple[str, ...] = (), **keywords) -> tuple[tuple, dict]:
    """Positional and keyword arguments of pykern.policy_loss: what the loss needs, and the `extra` tensors."""
    positional = tuple(tensors[name] for name in ("logprobs", "old_logprobs", "advantages"))
    named = {name: tensors[name] for name in ("mask", "cu_seqlens", *extra) if name in tensors}
    row = pykern.LOSSES[keywords.get("loss", "grpo")]
    named |= {name: tensors[name] for name in row.needs}
    if row.anchor is not None and row.anchor_coef is None:
        named["anchor_coef"] = 0.2
    if kl is not None:
        named |= {"kl": kl, "kl_coef": 0.3, "ref_logprobs": tensors["ref_logprobs"]}
    if rollout:
        named["rollout_logprobs"] = tensors["rollout_logprobs"]
    if "entropy" in extra:
        named["entropy_coef"] = 0.05
    return positional, named | keywords


def parts(row: Loss, limits: Limits) -> dict:
    """The definition's keywords that a row of LOSSES and one of PRESETS stand for."""
    names = (
        "ratio", "rule", "stabilisation", "clip_low", "clip_high", "ratio_limit", "dual_clip", "weight_negative_only",
        "negative_scale", "stabilisation_low", "stabilisation_high", "anchor", "anchor_coef", "aggregate",
    )  # fmt: skip
    result = {name: getattr(row, name) for name in names}
    result |= {
        "shape": shape(row.temperatures, row.taper),
        "log_ratio_limit": limits.log_ratio,
        "sequence_log_ratio_low": limits.sequence_log_ratio_low,
        "sequence_log_ratio_high": limits.sequence_log_ratio_high,
        "kl_log_ratio_limit": limits.kl_log_ratio,
        "kl_limit": limits.kl,
    }
    if limits.dual_clip is not None:
        result["dual_clip"] = min(row.dual_clip, limits.dual_clip)
    return result


def shape(temperatures, taper) -> tuple[float, float, float, float]:
    if taper is not None:
        return (*taper[0], *taper[1])
    return (*temperatures, 0.0, 0.0) if temperatures is not None else (0.0, 0.0, 0.0, 0.0)


def definition(positional: tuple, named: dict, dtype=torch.float64):
    """Loss, metrics and gradients of the definition, computed in `dtype`."""
    named = dict(named)
    loss = named.pop("loss", "grpo")
    row, limits = pykern.LOSSES[loss], PRESETS[named.pop("preset", None)]
    keywords = parts(row, limits.losses.get(loss, limits))
    keywords["rollout_high"] = named.pop("rollout_clip", 2.0)
    if "temperatures" in named or "taper" in named:
        keywords["shape"] = shape(named.pop("temperatures", None), named.pop("taper", None))
    keywords |= {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in named.items()
    }
    logprobs, old, advantages = (tensor.detach().to(dtype) for tensor in positional)
    if keywords["anchor"] is not None:
        keywords.setdefault("anchor_logprobs", old)
    return differentiate(reference.policy_loss, (logprobs, old, advantages), keywords)


def ours(positional: tuple, named: dict):
    """Loss, metrics and gradients of pykern.policy_loss."""
    return differentiate(pykern.policy_loss, positional, named)


def differentiate(function, positional: tuple, named: dict):
    """Loss, metrics, gradient of logprobs, and that of entropy if it is there."""
    leaves = {"logprobs": positional[0].detach().clone().requires_grad_()}
    if "entropy" in named:
        leaves["entropy"] = named["entropy"].detach().clone().requires_grad_()
        named = named | {"entropy": leaves["entropy"]}
    loss, metrics = function(leaves["logprobs"], *positional[1:], **named)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=function is reference.policy_loss)
    gradients = [
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves.values(), gradients)
    ]
    return loss.detach(), metrics, *gradients
