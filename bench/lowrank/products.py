"""The projection of gradients and the change of weights, of the matrices of a layer at once and of one matrix."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case
from pykern.lowrank import ops

Shapes = list[tuple[int, int]]


def oriented(n: int, length: int, i: int) -> Tensor:
    """[n, length], whose unit stride is along either axis by turns, as the matrices of a layer have it."""
    return torch.randn(length, n).bfloat16().mT if i % 2 else torch.randn(n, length).bfloat16()


def make_project(shapes: Shapes, rank: int) -> dict[str, Callable]:
    grads = [oriented(n, length, i) for i, (n, length) in enumerate(shapes)]
    basis = [torch.randn(n, rank).div_(n**0.5).bfloat16() for n, _ in shapes]
    low = [torch.empty(rank, length) for _, length in shapes]
    squares = [torch.empty(length) for _, length in shapes]

    def plain() -> list[tuple[Tensor, Tensor]]:
        return [(p.mT @ g, g.float().square().sum(dim=0)) for p, g in zip(basis, grads, strict=True)]

    return {
        "pykern": partial(ops.low_rank_project, grads, basis, None, low, squares, maximize=False),
        "plain PyTorch": plain,
    }


def make_apply(shapes: Shapes, rank: int, rounding: int) -> dict[str, Callable]:
    """Fira's update: what is projected up, and the gradient by a factor for each column."""
    weights, grads = ([oriented(n, length, i) for i, (n, length) in enumerate(shapes)] for _ in range(2))
    basis = [torch.randn(n, rank).div_(n**0.5).bfloat16() for n, _ in shapes]
    direction = [torch.randn(rank, length) for _, length in shapes]
    factors = [torch.rand(length) for _, length in shapes]
    steps, seeds = [torch.ones(()) for _ in shapes], list(range(len(shapes)))
    factor, lr = torch.ones(len(shapes), dtype=torch.float64), torch.full((), 1e-4, dtype=torch.float64)

    def plain() -> None:
        for w, p, x, g, c in zip(weights, basis, direction, grads, factors, strict=True):
            w.add_(p @ x.bfloat16() + g * c.bfloat16(), alpha=-1e-4)

    return {
        "pykern": partial(
            ops.low_rank_apply, weights, basis, direction, grads, factors, [], [], steps, seeds, factor, lr, None, None,
            scale=1.0, weight_decay=0.0, decay_after=False, sign_scale=0.0, rounding=rounding, maximize=False,
        ),
        "plain PyTorch": plain,
    }  # fmt: skip


def product_cases(device: str) -> list[Case]:
    one, layer = [(4096, 4096)], [(4096, 4096)] * 4 + [(4096, 11008)] * 3
    listed = []
    for shapes, rank in ((one, 128), *(((layer, 128), (layer, 256), (layer, 1024)) if device == "cuda" else ())):
        size, low = sum(n * length for n, length in shapes), rank * sum(length for _, length in shapes)
        shape = f"{len(shapes)} x 4096, r{rank} bfloat16"
        flops = 2.0 * size * rank
        make = partial(make_project, shapes, rank)
        listed.append(
            Case("lowrank", "project", shape, make, flops=flops, bytes=2.0 * size + 4.0 * low, dtype="bfloat16")
        )
        for rounding, name in ((0, "apply"), (1, "apply_stochastic")):
            make = partial(make_apply, shapes, rank, rounding)
            listed.append(
                Case("lowrank", name, shape, make, flops=flops, bytes=6.0 * size + 4.0 * low, dtype="bfloat16")
            )
    return listed
