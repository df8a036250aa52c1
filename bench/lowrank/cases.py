"""Optimizer steps of one weight, and the choice of a new subspace."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pykern
from bench.harness import Case
from bench.lowrank.cases_refresh import refresh_cases
from bench.lowrank.quantized import quantized_cases
from pykern.lowrank import ops
from pykern.lowrank.matrices import compresses_right

NEVER = 10**9


def plain_step(param: Tensor, projector: Tensor, right: bool, fira: bool) -> Callable[[], None]:
    """The update as plain PyTorch writes it, in the weight's dtype and with full-size temporaries."""
    grad = param.grad
    first = torch.zeros_like(grad @ projector if right else projector.mT @ grad)
    second = torch.zeros_like(first)
    scale, norm, count = 1.0 if fira else 0.25, None, 0

    def up(matrix: Tensor) -> Tensor:
        return (matrix @ projector.mT if right else projector @ matrix) * scale

    @torch.no_grad()
    def step() -> None:
        nonlocal norm, count
        count += 1
        low = grad @ projector if right else projector.mT @ grad
        first.mul_(0.9).add_(low, alpha=0.1)
        second.mul_(0.999).addcmul_(low, low, value=0.001)
        direction = first / second.sqrt().add_(1e-6)
        update = up(direction)
        if fira:
            axis = 1 if right else 0
            ratio = direction.norm(dim=axis, keepdim=True) / (low.norm(dim=axis, keepdim=True) + 1e-8)
            residual = (grad - up(low)) * ratio
            size = residual.norm()
            if norm is not None:
                limiter = (size / (norm + 1e-8)).clamp_min(1.01) / 1.01
                residual, size = residual / limiter, size / limiter
            norm = size
            update = update + residual
        param.add_(update, alpha=-1e-3 * (1 - 0.999**count) ** 0.5 / (1 - 0.9**count))

    return step


def peer_step(param: Tensor, projector: Tensor, right: bool, rank: int, fira: bool) -> Callable[[], None] | None:
    """The package's own optimizer on the same basis, or None where the package is not installed."""
    try:
        if fira:
            from fira import FiraAdamW as Peer
            from fira.gradient_projection import GradientProjector as PeerProjector
        else:
            from galore_torch import GaLoreAdamW as Peer
            from galore_torch.galore_projector import GaLoreProjector as PeerProjector
    except ImportError:
        return None
    parts = {"update_proj_gap": NEVER, "proj_type": "std", **({"alpha": 1.0} if fira else {"scale": 0.25})}
    optimizer = Peer([{"params": [param], "rank": rank, **parts}], lr=1e-3, no_deprecation_warning=True)
    # A singular value decomposition of a large weight takes minutes and is no part of an ordinary step.
    chosen = PeerProjector(rank, **parts)
    chosen.ortho_matrix = projector.mT.contiguous() if right else projector
    # A step count that is no multiple of the gap: the package refreshes at step 0.
    optimizer.state[param].update(projector=chosen, step=1)
    return optimizer.step


def make_step(rows: int, columns: int, rank: int, dtype: torch.dtype, fira: bool) -> dict[str, Callable]:
    right = compresses_right(rows, columns, "std")
    start = torch.randn(rows, columns).mul_(0.02).to(dtype)
    grad = torch.randn(rows, columns).to(dtype)
    projector = torch.linalg.qr(torch.randn(min(rows, columns), rank))[0].to(dtype)

    def fresh() -> Tensor:
        param = torch.nn.Parameter(start.clone())
        param.grad = grad
        return param

    preset = pykern.FiraAdamW if fira else pykern.GaLoreAdamW
    providers = {
        "pykern": preset([fresh()], 1e-3, rank=rank, refresh_every=NEVER, projector=projector).step,
        "plain PyTorch": plain_step(fresh(), projector, right, fira),
    }
    peer = peer_step(fresh(), projector, right, rank, fira)
    if peer is not None:
        providers["fira" if fira else "galore_torch"] = peer
    return providers


def make_adamw(size: int) -> dict[str, Callable]:
    def fresh() -> Tensor:
        param = torch.nn.Parameter(torch.full((size,), 0.02, dtype=torch.bfloat16))
        param.grad = torch.ones_like(param)
        return param

    return {
        "pykern (float32 moments)": pykern.LowRankAdamW([fresh()], 1e-3).step,
        "torch fused (bfloat16 moments)": torch.optim.AdamW([fresh()], 1e-3, fused=True).step,
    }


def make_phase(rank: int, length: int) -> dict[str, Callable]:
    """Adam in the subspace on 8-bit moments, and on float32 ones as plain PyTorch writes it."""
    low, step = torch.randn(rank, length).bfloat16(), torch.zeros(())
    codes = [torch.zeros(rank, length, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(rank, -(-length // 256)) for _ in range(2)]
    first, second = torch.zeros(rank, length), torch.zeros(rank, length)
    rule = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "corrected_eps": True, "maximize": False}

    def plain() -> Tensor:
        gradient = low.float()
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        return (first / second.sqrt().add_(1e-8)).bfloat16()

    moments = [torch.zeros(rank, length) for _ in range(2)]
    return {
        "pykern (8-bit moments)": partial(ops.low_rank_adam_phase, low, *codes, *scales, step, **rule),
        "pykern (float32 moments)": partial(ops.low_rank_adam_phase, low, *moments, None, None, step, **rule),
        "plain PyTorch (float32 moments)": plain,
    }


def cases(device: str) -> list[Case]:
    large = device == "cuda"
    listed = []
    for rows, columns, rank, dtype in (
        (4096, 4096, 128, torch.bfloat16),
        (4096, 11008, 128, torch.bfloat16),
        (2048, 2048, 512, torch.bfloat16),
        (1376, 512, 128, torch.bfloat16),
        (2048, 2048, 128, torch.float32),
    ):
        size, low = rows * columns, max(rows, columns) * rank
        width = 4 if dtype == torch.float32 else 2
        name = "float32" if dtype == torch.float32 else "bfloat16"
        for fira in (False, True):
            listed.append(
                Case(
                    "lowrank",
                    "fira_step" if fira else "galore_step",
                    f"{rows}x{columns} r{rank} {name}",
                    partial(make_step, rows, columns, rank, dtype, fira),
                    flops=4.0 * size * rank,
                    # Read the gradient (twice for Fira), read and write the weight and both moments.
                    bytes=size * width * (4 if fira else 3) + 16.0 * low,
                    dtype=name,
                )
            )
    for millions in (16, 256) if large else (16,):
        size = millions << 20
        step = partial(make_adamw, size)
        listed.append(Case("lowrank", "adamw_step", f"{millions}M bfloat16", step, bytes=22.0 * size))
    for rank, length in ((128, 11008), (1024, 4096), *([(1024, 65536)] if large else [])):
        # Read the gradient, write the direction, read and write the codes and scales of both moments.
        moved = (2 * 2 + 4 * 1 + 16 / 256) * rank * length
        shape = f"r{rank} x {length} bfloat16"
        listed.append(Case("lowrank", "adam_phase", shape, partial(make_phase, rank, length), bytes=moved))
    return [*listed, *refresh_cases(), *quantized_cases()]
