"""The parts of a low-rank step, each beside the same in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case
from pykern.lowrank import ops

LIMIT = {
    "scale": 1.0, "removed": 1.0, "per_tensor": False, "amplitude": 1.0, "amplitude_first": False, "growth": 1.01,
    "zero_norm_limits": False, "maximize": False,
}  # fmt: skip
APPLY = {
    "scale": 1.0, "weight_decay": 0.0, "decay_after": False, "sign_scale": 0.0, "rounding": 0, "maximize": False,
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


def make_project(n: int, length: int, rank: int) -> dict[str, Callable]:
    grad, basis = torch.randn(n, length).bfloat16(), torch.linalg.qr(torch.randn(n, rank))[0].bfloat16().contiguous()
    low, squares = torch.empty(rank, length), torch.empty(length)
    return {
        "pykern": partial(ops.low_rank_project, [grad], [basis], None, [low], [squares], maximize=False),
        "plain PyTorch": lambda: (basis.mT @ grad, grad.float().square().sum(0)),
    }


def make_ratios(rank: int, length: int) -> dict[str, Callable]:
    low, direction, squares = torch.randn(rank, length), torch.randn(rank, length), torch.full((length,), 2.0 * rank)
    ratios, sums = torch.empty(length), torch.empty(1, 3, dtype=torch.float64)

    def plain() -> tuple[Tensor, ...]:
        norm, own = direction.norm(dim=0), low.norm(dim=0)
        phi = norm / (own + 1e-8)
        return phi, norm.square().sum(), own.square().sum(), (phi.square() * (squares - own.square())).sum()

    return {
        "pykern": partial(
            ops.low_rank_ratios, [low], [direction], [squares], [], [ratios], sums, per_tensor=False, removed=1.0
        ),
        "plain PyTorch": plain,
    }


def make_limit(rank: int, length: int) -> dict[str, Callable]:
    low, direction, ratios = torch.randn(rank, length), torch.randn(rank, length), torch.ones(length)
    sums, norm = torch.ones(1, 3, dtype=torch.float64), torch.ones(())
    return {
        "pykern": partial(
            ops.low_rank_limit, [low], [direction], [ratios], sums, [norm], None, None, **{**LIMIT, "growth": 0.0}
        ),
        "plain PyTorch": lambda: direction.sub_(ratios * low),
    }


def make_apply(n: int, length: int, rank: int) -> dict[str, Callable]:
    weight, grad = torch.randn(n, length).bfloat16(), torch.randn(n, length).bfloat16()
    basis, direction = torch.randn(n, rank).bfloat16(), torch.randn(rank, length)
    factors, step, factor = torch.ones(length), torch.ones(()), torch.ones(1, dtype=torch.float64)
    lr = torch.full((), 1e-6, dtype=torch.float64)
    own = weight.clone()
    return {
        "pykern": partial(
            ops.low_rank_apply,
            [weight],
            [basis],
            [direction],
            [grad],
            [factors],
            [],
            [],
            [step],
            [0],
            factor,
            lr,
            None,
            None,
            **APPLY,
        ),  # fmt: skip
        "plain PyTorch": lambda: own.sub_((basis @ direction.bfloat16() + grad * factors.bfloat16()) * 1e-6),
    }


def cases(device: str) -> list[Case]:
    large = device == "cuda"
    listed = []
    for rank, length in ((128, 11008), (1024, 4096), *([(1024, 65536)] if large else [])):
        # Read the gradient, write the direction, read and write the codes and scales of both moments.
        moved = (2 * 4 + 4 * 1 + 16 / 256) * rank * length
        listed.append(
            Case("lowrank", "adam_phase", f"r{rank} x {length}", partial(make_rule, rank, length), bytes=moved)
        )
    n, length = (4096, 11008) if large else (1024, 2752)
    rank, low = 128, 128 * length
    shape, size = f"{n}x{length} r{rank}", n * length
    listed += [
        Case(
            "lowrank", "project", f"{shape} bfloat16", partial(make_project, n, length, rank),
            flops=2.0 * size * rank, bytes=2.0 * size + 4.0 * low, dtype="bfloat16",
        ),
        Case("lowrank", "ratios", f"r{rank} x {length}", partial(make_ratios, rank, length), bytes=8.0 * low),
        Case("lowrank", "limit", f"r{rank} x {length}", partial(make_limit, rank, length), bytes=12.0 * low),
        Case(
            "lowrank", "apply", f"{shape} bfloat16", partial(make_apply, n, length, rank),
            flops=2.0 * size * rank, bytes=6.0 * size + 4.0 * low, dtype="bfloat16",
        ),
    ]  # fmt: skip
    return listed
