"""What only a GPU has room or time for: the steps of whole models, and weights at the sizes of large ones.

The floors: GaLore reads the gradient and reads and writes the weight, 6 bytes an element in bfloat16, as long as its
products stay below that (rank 256 or less); Fira and APOLLO read the gradient twice, 8 bytes. Moments come to that.
"""

from collections.abc import Callable
from functools import partial

import torch

import pykern
from bench.harness import Case

NEVER = 10**9
PRESETS = {
    "galore": (pykern.GaLoreAdamW, 6),
    "fira": (pykern.FiraAdamW, 8),
    "apollo": (pykern.ApolloAdamW, 8),
    "apollo_mini": (pykern.ApolloMini, 8),
}
LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
LLAMA_7B = LAYER * 32
"""Rows and columns of the 224 matrices in LLaMA-7B's layers."""


def weights(shapes: list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    found = [torch.nn.Parameter(torch.full(shape, 0.02, dtype=torch.bfloat16)) for shape in shapes]
    for param in found:
        param.grad = torch.randn_like(param)
    return found


def basis(matrix: torch.Tensor, rank: int, right: bool) -> torch.Tensor:
    """Any orthonormal columns: choosing a subspace is no part of an ordinary step."""
    size = matrix.shape[1] if right else matrix.shape[0]
    return torch.linalg.qr(torch.randn(size, rank, device=matrix.device))[0].to(matrix.dtype)


def make_step(shapes: list[tuple[int, int]], rank: int, kind: str) -> dict[str, Callable]:
    """The low-rank step beside PyTorch's fused AdamW on full moments, each on weights of its own."""
    params, others = weights(shapes), weights(shapes)
    for param, other in zip(params, others, strict=True):
        other.grad = param.grad
    optimizer = PRESETS[kind][0](
        params, torch.full((), 1e-6, dtype=torch.float64), rank=rank, refresh_every=NEVER, projector=basis
    )
    return {
        "pykern": optimizer.step,
        "torch fused AdamW": torch.optim.AdamW(others, torch.full((), 1e-6), fused=True).step,
    }


def make_adamw(shapes: list[tuple[int, int]]) -> dict[str, Callable]:
    params, others = weights(shapes), weights(shapes)
    return {
        "pykern (float32 moments)": pykern.LowRankAdamW(params, 1e-6).step,
        "torch fused (bfloat16 moments)": torch.optim.AdamW(others, 1e-6, fused=True).step,
    }


def case(name: str, shapes: list[tuple[int, int]], rank: int, kind: str) -> Case:
    elements = sum(rows * columns for rows, columns in shapes)
    low = sum(max(shape) * rank for shape in shapes)
    return Case(
        "lowrank",
        f"{kind}_step",
        f"{name} r{rank} bfloat16",
        partial(make_step, shapes, rank, kind),
        flops=4.0 * elements * rank if kind in ("galore", "fira") else 2.0 * elements * rank,
        # Both moments are read and written.
        bytes=PRESETS[kind][1] * elements + 16.0 * low,
        dtype="bfloat16",
    )


def cases() -> list[Case]:
    found = []
    for kind in PRESETS:
        rank = 1 if kind == "apollo_mini" else 128
        found.append(case("LLaMA-7B, 224 matrices", LLAMA_7B, rank, kind))
        found.append(case("11008x4096", [(11008, 4096)], rank, kind))
        if kind != "apollo_mini":
            found.append(case("8192x28672", [(8192, 28672)], 256, kind))
    biases = [(4096, 1)] * 65 + [(32000, 4096)] * 2
    size = sum(rows * columns for rows, columns in biases)
    shape = "LLaMA-7B, norms and embeddings, bfloat16"
    # Read the gradient; read and write the weight in bfloat16 and both moments in float32.
    found.append(Case("lowrank", "adamw_step", shape, partial(make_adamw, biases), bytes=22.0 * size))
    return found
