"""Lists of matrices for the tests of the low-rank parts."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(17, 33, 5), (130, 70, 16), (64, 301, 7), (270, 9, 3), (9, 520, 8), (5, 1, 2), (1, 5, 1)]
"""Sizes n, length and rank of one list."""


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laid_out(values: Tensor, *, right: bool, gap: int = 0) -> Tensor:
    """A copy of `values` [n, length] whose columns (`right`) or rows are contiguous, `gap` NaN behind each."""
    matrix = values.mT if right else values
    memory = torch.full((matrix.shape[0], matrix.shape[1] + gap), float("nan"), dtype=values.dtype)
    memory = memory.to(values.device)
    memory[:, : matrix.shape[1]] = matrix
    view = memory[:, : matrix.shape[1]]
    return view.mT if right else view


def matrices(
    dtype: torch.dtype, device="cpu", *, right: bool = False, gap: int = 0, seed: int = 0, shapes=SHAPES
) -> list[Tensor]:
    """[n, length] each."""
    values = (normal(n, length, seed=seed + i).to(dtype).to(device) for i, (n, length, _) in enumerate(shapes))
    return [laid_out(value, right=right, gap=gap) for value in values]


def projectors(dtype: torch.dtype, device="cpu", *, seed: int = 100, shapes=SHAPES) -> list[Tensor]:
    """[n, rank] each, with columns of about unit norm, not orthonormal."""
    return [(normal(n, r, seed=seed + i) / n**0.5).to(dtype).to(device) for i, (n, _, r) in enumerate(shapes)]


def low_rank(dtype: torch.dtype, device="cpu", *, seed: int = 200, shapes=SHAPES) -> list[Tensor]:
    """[rank, length] each, of the wide dtype."""
    return [normal(r, m, seed=seed + i).to(wide(dtype)).to(device) for i, (_, m, r) in enumerate(shapes)]


def columns(dtype: torch.dtype, device="cpu", *, seed: int = 300, shapes=SHAPES) -> list[Tensor]:
    """[length] each, positive, of the wide dtype."""
    return [(normal(m, seed=seed + i).abs() + 0.1).to(wide(dtype)).to(device) for i, (_, m, _) in enumerate(shapes)]


def one(value: float, device="cpu", dtype=torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
