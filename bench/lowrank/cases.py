"""Optimizer steps of one weight, and the choice of a new subspace."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pykern
from bench.harness import Case
from bench.lowrank import cases_gpu, cases_parts
from bench.lowrank.products import product_cases
from bench.lowrank.quantized import quantized_cases
from bench.lowrank.steps import make_step
from pykern.lowrank import ops
from pykern.lowrank.matrices import compresses_right
from pykern.lowrank.projectors import gram_projector


def make_refresh(rows: int, columns: int, rank: int) -> dict[str, Callable]:
    grad = torch.randn(rows, columns).bfloat16()
    right = compresses_right(rows, columns, "std")

    def decomposition() -> Tensor:
        """What the GaLore and Fira packages do at a refresh."""
        left_vectors, _, right_vectors = torch.linalg.svd(grad.float(), full_matrices=False)
        return right_vectors[:rank].mT if right else left_vectors[:, :rank]

    return {"pykern": partial(gram_projector, grad, rank, right), "thin SVD (peers)": decomposition}


def make_adamw(size: int) -> dict[str, Callable]:
    def fresh() -> Tensor:
        param = torch.nn.Parameter(torch.full((size,), 0.02, dtype=torch.bfloat16))
        param.grad = torch.ones_like(param)
        return param

    return {
        "pykern (float32 moments)": pykern.LowRankAdamW([fresh()], 1e-3).step,
        "torch fused (bfloat16 moments)": torch.optim.AdamW([fresh()], 1e-3, fused=True).step,
    }


def make_rule(rank: int, length: int) -> dict[str, Callable]:
    """Adam in the subspace on 8-bit moments, and on float32 ones as plain PyTorch writes it."""
    low, step = torch.randn(rank, length), torch.zeros(())
    codes = [[torch.zeros(rank, length, dtype=torch.uint8)] for _ in range(2)]
    scales = [[torch.zeros(rank, -(-length // 256))] for _ in range(2)]
    moments = [[torch.zeros(rank, length)] for _ in range(2)]
    first, second = torch.zeros(rank, length), torch.zeros(rank, length)
    rest = ([step], [torch.empty_like(low)], torch.zeros(1, dtype=torch.float64), None)
    rule = {"rule": 0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "corrected_eps": True}

    def plain() -> Tensor:
        first.mul_(0.9).add_(low, alpha=0.1)
        second.mul_(0.999).addcmul_(low, low, value=0.001)
        return first / second.sqrt().add_(1e-8)

    return {
        "pykern (8-bit moments)": partial(ops.low_rank_rule, [low], *codes, *scales, *rest, **rule),
        "pykern (float32 moments)": partial(ops.low_rank_rule, [low], *moments, [], [], *rest, **rule),
        "plain PyTorch (float32 moments)": plain,
    }


def cases(device: str) -> list[Case]:
    large = device == "cuda"
    listed = []
    for rows, columns, rank, dtype in (
        (4096, 4096, 32, torch.bfloat16),
        (4096, 4096, 128, torch.bfloat16),
        (4096, 4096, 512, torch.bfloat16),
        (4096, 11008, 128, torch.bfloat16),
        (1024, 2736, 256, torch.bfloat16),
        (2048, 2048, 512, torch.bfloat16),
        (1376, 512, 128, torch.bfloat16),
        (2048, 2048, 128, torch.float32),
    ):
        size, low = rows * columns, max(rows, columns) * rank
        width = 4 if dtype == torch.float32 else 2
        name = "float32" if dtype == torch.float32 else "bfloat16"
        for method in ("galore", "fira", "apollo"):
            listed.append(
                Case(
                    "lowrank",
                    f"{method}_step",
                    f"{rows}x{columns} r{rank} {name}",
                    partial(make_step, method, rows, columns, rank, dtype),
                    # APOLLO projects down only.
                    flops=(2.0 if method == "apollo" else 4.0) * size * rank,
                    # Read the gradient (twice but for GaLore), read and write the weight and both moments.
                    bytes=size * width * (3 if method == "galore" else 4) + 16.0 * low,
                    dtype=name,
                )
            )
    for millions in (16, 256) if large else (16,):
        size = millions << 20
        step = partial(make_adamw, size)
        listed.append(Case("lowrank", "adamw_step", f"{millions}M bfloat16", step, bytes=22.0 * size))
    for rank, length in ((128, 11008), (1024, 4096), *([(1024, 65536)] if large else [])):
        # Read the gradient, write the direction, read and write the codes and scales of both moments.
        moved = (2 * 4 + 4 * 1 + 16 / 256) * rank * length
        shape = f"r{rank} x {length} 8-bit"
        listed.append(Case("lowrank", "low_rank_rule", shape, partial(make_rule, rank, length), bytes=moved))
    for rows, columns, rank in ((512, 1376, 128), (1024, 1024, 128)):
        listed.append(
            Case("lowrank", "refresh", f"{rows}x{columns} r{rank} bfloat16", partial(make_refresh, rows, columns, rank))
        )
    own = cases_gpu.cases() if large else []
    return [*listed, *cases_parts.cases(device), *product_cases(device), *own, *quantized_cases()]
