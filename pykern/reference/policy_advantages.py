"""What group_advantages means, in plain PyTorch. Slow: one group at a time."""

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    baseline: str,
    scale: str,
    eps: float,
    ddof: int = 1,
    singleton: str = "zero",
    lengths: Tensor | None = None,
    baseline_rewards: Tensor | None = None,
) -> Tensor:
    """Advantages [N] in the dtype of rewards; the parts are those of pykern.BASELINES and pykern.SCALES."""
    finite = rewards.isfinite()
    if baseline_rewards is not None:
        finite = finite & baseline_rewards.isfinite()
    centred = torch.zeros_like(rewards)
    divisor = torch.ones_like(rewards)
    no_signal = torch.zeros_like(finite)
    for group in group_ids.unique():
        rows = ((group_ids == group) & finite).nonzero().flatten()
        values = rewards[rows]
        n = len(rows)
        if n == 0:
            continue
        equal = bool(values.max() == values.min())
        mean = values.mean()
        if baseline == "none":
            centred[rows] = values
        elif baseline == "given":
            centred[rows] = values - baseline_rewards[rows]
        elif n == 1:
            centred[rows] = values if singleton == "self" else 0.0
            no_signal[rows] = singleton == "zero"
        elif equal:
            no_signal[rows] = True
        elif baseline == "group_mean":
            centred[rows] = values - mean
        elif baseline == "leave_one_out":
            centred[rows] = values - (values.sum() - values) / (n - 1)
        elif lengths[rows].sum() > 0:
            weights = lengths[rows].to(values.dtype)
            centred[rows] = values - (weights * values).sum() / weights.sum()
        if scale == "group_std":
            divisor[rows] = eps + (values.std(correction=ddof) if n > 1 else 1.0)
    kept = rewards[finite]
    if scale == "batch_std":
        divisor[:] = eps + (kept.std(correction=ddof) if len(kept) > 1 else 1.0)
    if scale == "token_whiten":
        tokens = torch.repeat_interleave(centred[finite], lengths[finite].clamp(min=0))
        if len(tokens) == 0 or bool(tokens.max() == tokens.min()):
            return torch.zeros_like(rewards)
        centred = centred - tokens.mean()
        divisor[:] = torch.sqrt(tokens.var(correction=ddof) + eps)
        finite = finite & (lengths > 0)
    return torch.where(finite & ~no_signal, centred / divisor, 0.0)
