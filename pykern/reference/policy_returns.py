"""What discounted_returns, gae and masked_whiten mean, in plain PyTorch. Slow: one token after the other."""

import torch
from torch import Tensor


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    carry: str = "through",
) -> Tensor:
    """The rewards' shape; see pykern.discounted_returns."""
    zeros = torch.zeros_like(rewards)
    return gae(rewards, zeros, gamma=gamma, lam=1.0, mask=mask, cu_seqlens=cu_seqlens, carry=carry)[0]


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    carry: str = "through",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns in the rewards' shape; see pykern.gae."""
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    if cu_seqlens is not None:
        pairs = []
        for sequence, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])):
            of_sequence = lam[sequence : sequence + 1] if isinstance(lam, Tensor) else lam
            rows = (tensor[None, begin:end] for tensor in (rewards, values, mask))
            rewards_row, values_row, mask_row = rows
            pair = gae(rewards_row, values_row, gamma=gamma, lam=of_sequence, mask=mask_row, carry=carry)
            pairs.append([tensor[0] for tensor in pair])
        if not pairs:
            return torch.zeros_like(rewards), torch.zeros_like(rewards)
        advantages, returns = zip(*pairs)
        return torch.cat(advantages), torch.cat(returns)
    zero = rewards.new_zeros(rewards.shape[0])
    next_value, next_advantage = zero, zero
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        reward, value = (torch.where(counts, tensor[:, t], zero) for tensor in (rewards, values))
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        moves = counts if carry == "through" else torch.ones_like(counts)
        next_value = torch.where(moves, value, next_value)
        next_advantage = torch.where(moves, advantage, next_advantage)
        advantages[:, t] = torch.where(counts, advantage, zero)
        returns[:, t] = torch.where(counts, advantage + value, zero)
    return advantages, returns


def masked_whiten(
    values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8, ddof: int = 1
) -> Tensor:
    """The values' shape; see pykern.masked_whiten."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    kept = values[mask]
    whitened = torch.zeros_like(values)
    if len(kept) == 0:
        return whitened
    if bool((kept == kept[0]).all()) and bool(kept[0].isfinite()):
        if not shift_mean:
            whitened[mask] = kept
        return whitened
    mean = kept.mean()
    whitened[mask] = (kept - mean) / torch.sqrt(kept.var(correction=ddof) + eps) + (0.0 if shift_mean else mean)
    return whitened
