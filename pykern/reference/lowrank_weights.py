"""What the layers with factored weights mean, in plain PyTorch: the weight is made whole."""

import torch
from torch import Tensor


def sltrain_weight(up: Tensor, down: Tensor, values: Tensor, row_start: Tensor, column: Tensor, scale: float) -> Tensor:
    """W = scale * up @ down + sparse; entry e of row r is at column[e], row_start[r] <= e < row_start[r + 1]."""
    rows = torch.repeat_interleave(torch.arange(up.shape[0], device=up.device), row_start.diff())
    sparse = torch.zeros(up.shape[0], down.shape[1], dtype=up.dtype, device=up.device)
    return scale * (up @ down) + sparse.index_put((rows, column.long()), values)


def normalized_weight(weight: Tensor, up: Tensor, down: Tensor, magnitude: Tensor, norm: str) -> Tensor:
    """W = magnitude * V / |V| with V = weight + up @ down; |V| over rows ("output") or columns ("input")."""
    direction = weight + up @ down
    dim = 1 if norm == "output" else 0
    return direction / direction.norm(dim=dim, keepdim=True) * magnitude.unsqueeze(dim)
