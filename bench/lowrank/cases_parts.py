"""The parts of a low-rank step inside the subspace, each beside the same in plain PyTorch."""

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


def make_rule(rank: int, length: int) -> dict[str, Callable]:
    """Adam in the subspace on 8-bit moments, and on float32 ones as plain PyTorch writes it."""
    low, direction, step = torch.randn(rank, length), torch.empty(rank, length), torch.zeros(())
    factor = torch.empty(1, dtype=torch.float64)
    codes = [torch.zeros(rank, length, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(rank, -(-length // 256)) for _ in range(2)]
    first, second = torch.zeros(rank, length), torch.zeros(rank, length)
    moments = [torch.zeros(rank, length) for _ in range(2)]

    def rule(moments: list[Tensor], scales: list[list[Tensor]]) -> Callable[[], None]:
        return partial(
            ops.low_rank_rule, [low], *([moment] for moment in moments), *scales, [step], [direction], factor, None,
            rule=0, beta1=0.9, beta2=0.999, eps=1e-8, corrected_eps=True,
        )  # fmt: skip

    def plain() -> Tensor:
        first.mul_(0.9).add_(low, alpha=0.1)
        second.mul_(0.999).addcmul_(low, low, value=0.001)
        return first / second.sqrt().add_(1e-8)

    return {
        "pykern (8-bit moments)": rule(codes, [[scale] for scale in scales]),
        "pykern (float32 moments)": rule(moments, [[], []]),
        "plain PyTorch (float32 moments)": plain,
    }


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
    listed = []
    for rank, length in ((128, 11008), (1024, 4096), *([(1024, 65536)] if device == "cuda" else [])):
        low, shape = rank * length, f"r{rank} x {length}"
        # Read the gradient, write the direction, read and write the codes and scales of both moments.
        moved = (2 * 4 + 4 * 1 + 16 / 256) * low
        listed += [
            Case("lowrank", "rule", f"{shape} 8-bit", partial(make_rule, rank, length), bytes=moved),
            Case("lowrank", "ratios", shape, partial(make_ratios, rank, length), bytes=8.0 * low),
            Case("lowrank", "limit", shape, partial(make_limit, rank, length), bytes=12.0 * low),
        ]
    return listed
