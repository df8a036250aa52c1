"""The residual's ratios and their limit, beside the same in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case
from pykern.lowrank import ops

LIMIT = {
    "scale": 1.0, "removed": 1.0, "per_tensor": False, "amplitude": 1.0, "amplitude_first": False, "growth": 0.0,
    "zero_norm_limits": False, "maximize": False,
}  # fmt: skip


def make_ratios(rank: int, length: int) -> dict[str, Callable]:
    low, direction, squares = torch.randn(rank, length), torch.randn(rank, length), torch.full((length,), 2.0 * rank)
    lists = [low], [direction], [squares], [], [torch.empty(length)], torch.empty(1, 3, dtype=torch.float64)

    def plain() -> tuple[Tensor, ...]:
        norm, own = direction.norm(dim=0), low.norm(dim=0)
        phi = norm / (own + 1e-8)
        return phi, norm.square().sum(), own.square().sum(), (phi.square() * (squares - own.square())).sum()

    return {
        "pykern": partial(ops.low_rank_ratios, *lists, per_tensor=False, removed=1.0),
        "plain PyTorch": plain,
    }


def make_limit(rank: int, length: int) -> dict[str, Callable]:
    low, direction, ratios = torch.randn(rank, length), torch.randn(rank, length), torch.ones(length)
    rest = torch.ones(1, 3, dtype=torch.float64), [torch.ones(())], None, None
    return {
        "pykern": partial(ops.low_rank_limit, [low], [direction], [ratios], *rest, **LIMIT),
        "plain PyTorch": lambda: direction.sub_(ratios * low),
    }


def cases(device: str) -> list[Case]:
    rank, length = (1024, 65536) if device == "cuda" else (128, 11008)
    size, shape = rank * length, f"r{rank} x {length}"
    # Both matrices are read; the limit writes one of them.
    return [
        Case("lowrank", "low_rank_ratios", shape, partial(make_ratios, rank, length), bytes=8.0 * size),
        Case("lowrank", "low_rank_limit", shape, partial(make_limit, rank, length), bytes=12.0 * size),
    ]
