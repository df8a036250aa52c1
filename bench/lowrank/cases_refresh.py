"""The choice of a new subspace by every projector, beside the thin decomposition of the GaLore and Fira packages."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case
from pykern.lowrank import dct
from pykern.lowrank.projectors import PROJECTORS, Choice

DECOMPOSITION = "thin SVD (peers)"
DRIFT = 0.5
"""How far the gradient of the basis in use was from this one, relative to its norm: what "power" begins with."""


def gradient(rows: int, columns: int, tail: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix with singular values (1 + i)^-tail and random singular vectors."""
    count = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(size, count))[0] for size in (rows, columns))
    return ((left * (1.0 + torch.arange(count)) ** -tail) @ right.mT).to(dtype)


def drifted_basis(grad: Tensor, rank: int) -> Tensor:
    """The exact basis of an earlier gradient."""
    noise = torch.randn(grad.shape) * (DRIFT * grad.float().norm() / grad.numel() ** 0.5)
    return PROJECTORS["gram"].choose(Choice(grad.float() + noise, rank))


def vectors(name: str, chosen: Tensor, size: int) -> Tensor:
    """What a projector gave as P [n, rank]."""
    basis = PROJECTORS[name].basis
    if basis is None:
        return chosen.float()
    return dct.vectors(chosen, size, torch.float32) if basis == "dct" else torch.eye(size)[:, chosen]


def providers(grad: Tensor, rank: int) -> dict[str, Callable[[], Tensor]]:
    """Every projector, the exact one first, on the rows of `grad`; and the packages' decomposition."""
    previous = drifted_basis(grad, rank)

    def decomposition() -> Tensor:
        return torch.linalg.svd(grad.float(), full_matrices=False)[0][:, :rank]

    timed = {
        f"pykern {name}": partial(row.choose, Choice(grad, rank, previous, seed=1))
        for name, row in PROJECTORS.items()
        if name != "svd"
    }
    return {**timed, DECOMPOSITION: decomposition}


def make_refresh(rows: int, columns: int, rank: int) -> dict[str, Callable]:
    return providers(gradient(rows, columns, 0.5, torch.bfloat16), rank)


def refresh_cases() -> list[Case]:
    return [
        Case("lowrank", "refresh", f"{rows}x{columns} r{rank} bfloat16", partial(make_refresh, rows, columns, rank))
        for rows, columns, rank in ((512, 1376, 128), (1024, 1024, 128))
    ]
