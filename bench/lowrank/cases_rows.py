"""Steps on rows of the gradient: Grass, whose basis is no matrix to multiply by."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pykern
from bench.harness import Case
from bench.lowrank.cases_gpu import LLAMA_7B, NEVER, weights
from pykern.lowrank.matrices import compresses_right

Shapes = list[tuple[int, int]]


def plain_step(params: list[Tensor], picked: list[Tensor]) -> Callable[[], None]:
    """The same by index_select and index_add_."""
    axes = [1 if compresses_right(*param.shape, "std") else 0 for param in params]
    both = list(zip(params, picked, axes, strict=True))
    moments = [[torch.zeros_like(p.grad.index_select(axis, rows).float()) for _ in range(2)] for p, rows, axis in both]
    count = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal count
        count += 1
        rate = 1e-6 * 0.25 * (1 - 0.999**count) ** 0.5 / (1 - 0.9**count)
        for (param, rows, axis), (first, second) in zip(both, moments, strict=True):
            low = param.grad.index_select(axis, rows).float()
            first.mul_(0.9).add_(low, alpha=0.1)
            second.mul_(0.999).addcmul_(low, low, value=0.001)
            direction = first / second.sqrt().add_(1e-6)
            param.index_add_(axis, rows, direction.to(param.dtype), alpha=-rate)

    return step


def make_step(shapes: Shapes, rank: int) -> dict[str, Callable]:
    """Grass, the same in plain PyTorch, and GaLore, which multiplies by its basis."""
    lists = [weights(shapes)]
    for _ in range(2):
        # The same gradients: those of a whole model three times over would leave less room than many a GPU has.
        lists.append([torch.nn.Parameter(param.detach().clone()) for param in lists[0]])
        for param, first in zip(lists[-1], lists[0], strict=True):
            param.grad = first.grad
    options = {"rank": rank, "refresh_every": NEVER}
    grass = pykern.GrassAdamW(lists[0], 1e-6, **options)
    grass.step()
    picked = [grass.state[param]["projector_indices"] for param in lists[0]]
    return {
        "pykern": grass.step,
        "plain PyTorch": plain_step(lists[1], picked),
        "pykern GaLore": pykern.GaLoreAdamW(lists[2], 1e-6, projector="random_orthonormal", **options).step,
    }


def case(name: str, shapes: Shapes, rank: int) -> Case:
    size = 0.0
    for rows, columns in shapes:
        # Of picked columns the whole memory is read, and written where the weight is.
        touched = rows * columns if compresses_right(rows, columns, "std") else rank * columns
        size += 6.0 * touched + 16.0 * rank * max(rows, columns)
    return Case("lowrank", "grass_step", f"{name} r{rank} bfloat16", partial(make_step, shapes, rank), bytes=size)


def row_cases(device: str) -> list[Case]:
    one = [case(f"{rows}x{columns}", [(rows, columns)], 128) for rows, columns in ((4096, 4096), (4096, 11008))]
    return one + ([case("LLaMA-7B, 224 matrices", LLAMA_7B, 128)] if device == "cuda" else [])
