"""What the ops mean whose outputs are made again in the backward, in plain PyTorch. Works in any dtype."""

import math

import torch
from torch import Tensor

from .philox import philox


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """Rows of x, less their mean if `centred`, over the root of their mean square plus eps, times weight plus bias."""
    if centred:
        x = x - x.mean(dim=-1, keepdim=True)
    y = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def activation(gate: Tensor, up: Tensor | None, name: str) -> Tensor:
    """f(gate) * up, f one of "silu", "gelu", "gelu_tanh"."""
    if name == "silu":
        y = gate * gate.sigmoid()
    elif name == "gelu":
        y = gate * torch.special.erfc(-gate * math.sqrt(0.5)) / 2
    else:
        y = 0.5 * gate * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh())
    return y if up is None else y * up


def dropout(x: Tensor, seed: int, p: float) -> Tensor:
    """Element i stays, times 1 / (1 - p), where word i % 4 of Philox's counter (i / 4, 0, 0) is at least p 2^32."""
    calls = torch.arange(-(-x.numel() // 4), dtype=torch.int64)
    zero = torch.zeros_like(calls)
    words = philox((calls & 0xFFFFFFFF, calls >> 32, zero, zero), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    kept = torch.stack(words, dim=-1).view(-1)[: x.numel()].view(x.shape) >= round(p * 2**32)
    return torch.where(kept.to(x.device), x / (1 - p) if p < 1 else x, 0.0)
