"""SLTrain's linear layer, forward and backward, beside the same with the whole weight and its whole gradient."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pykern
from bench.harness import Case


def make_layer(tokens: int, size: int, rank: int, density: float) -> dict[str, Callable]:
    layer = pykern.SLTrainLinear(size, size, rank, density, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.up.normal_(std=0.02)
    x, grad = torch.randn(tokens, size).bfloat16().requires_grad_(), torch.randn(tokens, size).bfloat16()
    rows = torch.repeat_interleave(torch.arange(size, device=layer.row_start.device), layer.row_start.diff())
    places = rows * size + layer.column

    def ours() -> list[Tensor]:
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

    def whole() -> list[Tensor]:
        """As the released code writes it: the weight is made whole, and so is its gradient."""
        weight = (layer.scale * (layer.up @ layer.down)).flatten().index_add(0, places, layer.values)
        return torch.autograd.grad(x @ weight.view(size, size).mT, [x, *layer.parameters()], grad)

    return {"pykern": ours, "plain PyTorch": whole}


def sltrain_cases(device: str) -> list[Case]:
    tokens, size = (8192, 4096) if device == "cuda" else (1024, 2048)
    rank = size // 8
    # The products with the weight and with its gradient, those of the low-rank factors, and the weight made twice.
    flops = 6.0 * tokens * size * size + 12.0 * tokens * size * rank + 4.0 * size * size * rank
    shape = f"{tokens} x {size} r{rank} 3 % bfloat16"
    make = partial(make_layer, tokens, size, rank, 0.03)
    return [Case("lowrank", "sltrain_linear", shape, make, flops=flops, dtype="bfloat16")]
