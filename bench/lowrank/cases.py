"""Optimizer steps of one weight, and the choice of a new subspace."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pykern
from bench.harness import Case
from bench.lowrank import cases_gpu, cases_parts
from bench.lowrank.cases_refresh import refresh_cases
from bench.lowrank.cases_rows import row_cases
from bench.lowrank.cases_sltrain import sltrain_cases
from bench.lowrank.products import product_cases
from bench.lowrank.quantized import quantized_cases
from bench.lowrank.steps import make_step


def make_adamw(size: int) -> dict[str, Callable]:
    def fresh() -> Tensor:
        param = torch.nn.Parameter(torch.full((size,), 0.02, dtype=torch.bfloat16))
        param.grad = torch.ones_like(param)
        return param

    return {
        "pykern (float32 moments)": pykern.LowRankAdamW([fresh()], 1e-3).step,
        "torch fused (bfloat16 moments)": torch.optim.AdamW([fresh()], 1e-3, fused=True).step,
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
    own = cases_gpu.cases() if large else []
    return [
        *listed,
        *row_cases(device),
        *product_cases(device),
        *cases_parts.cases(device),
        *refresh_cases(),
        *own,
        *quantized_cases(),
        *sltrain_cases(device),
    ]
