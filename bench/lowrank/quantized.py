"""Matrices in 8 and 4 bits, and the step of weights in 8 bits, against the same in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case
from pykern.lowrank.quantized import GROUP, dequantize_groups, low_rank_apply_int8, quantize_groups, quantized_zeros


def plain_quantize(values: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = values.float().unflatten(1, (-1, GROUP))
    zero = groups.amin(dim=2, keepdim=True)
    scale = (groups.amax(dim=2, keepdim=True) - zero) / levels
    return ((groups - zero) / scale).round().to(torch.uint8), scale, zero


def plain_values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (zero + scale * codes).flatten(1)


def make_quantize(rows: int, columns: int, bits: int) -> dict[str, Callable]:
    values = torch.randn(rows, columns).bfloat16()
    kept = [[part] for part in quantized_zeros(rows, columns, bits, values.device).values()]
    return {
        "pykern": partial(quantize_groups, [values], *kept, None, bits=bits),
        # One code a byte, whatever the bits.
        "plain PyTorch": partial(plain_quantize, values, 2**bits - 1),
    }


def make_dequantize(rows: int, columns: int, bits: int) -> dict[str, Callable]:
    """A basis [columns, rows] in the layout that the products want."""
    values, target = torch.randn(rows, columns).bfloat16(), torch.empty(columns, rows, dtype=torch.bfloat16)
    kept = [[part] for part in quantized_zeros(rows, columns, bits, values.device).values()]
    quantize_groups([values], *kept, None, bits=bits)
    codes = plain_quantize(values, 2**bits - 1)
    return {
        "pykern": partial(dequantize_groups, *kept, [target.mT], None, bits=bits, adds=False, maximize=False),
        "plain PyTorch": lambda: target.copy_(plain_values(*codes).mT),
    }


def make_int8_step(rows: int, columns: int, rank: int) -> dict[str, Callable]:
    weight = torch.randn(rows, columns).mul_(0.02)
    kept = [[part] for part in quantized_zeros(rows, columns, 8, weight.device).values()]
    quantize_groups([weight], *kept, None, bits=8)
    codes = list(plain_quantize(weight, 255))
    basis, direction = torch.randn(rows, rank).bfloat16(), torch.randn(rank, columns)
    step, factor = torch.ones(()), torch.ones(1, dtype=torch.float64)
    lr = torch.full((), 1e-4, dtype=torch.float64)

    def plain() -> None:
        """In float32, with temporaries of the weight's size."""
        new = plain_values(*codes) - 1e-4 * (basis.float() @ direction)
        groups = new.unflatten(1, (-1, GROUP))
        codes[2] = groups.amin(dim=2, keepdim=True)
        codes[1] = (groups.amax(dim=2, keepdim=True) - codes[2]) / 255
        exact = (groups - codes[2]) / codes[1]
        codes[0] = (exact + torch.rand_like(exact)).floor().clamp_max(255).to(torch.uint8)

    return {
        "pykern": partial(
            low_rank_apply_int8, *kept, [basis], [direction], [step], [3], factor, lr, None,
            factor=1.0, weight_decay=0.0, decay_after=False,
        ),
        "plain PyTorch": plain,
    }  # fmt: skip


def quantized_cases() -> list[Case]:
    listed = []
    for rows, columns, bits in ((128, 4096, 4), (4096, 4096, 8), (4096, 4096, 4)):
        size, shape = rows * columns, f"{rows}x{columns} {bits} bits bfloat16"
        moved = size * (2 + bits / 8 + 8 / GROUP)
        for name, make in (("quantize_groups", make_quantize), ("dequantize_groups", make_dequantize)):
            listed.append(Case("lowrank", name, shape, partial(make, rows, columns, bits), bytes=moved))
    for rows, columns, rank in ((4096, 4096, 128),):
        # Read and write the codes.
        listed.append(
            Case(
                "lowrank",
                "apply_int8",
                f"{rows}x{columns} r{rank} bfloat16",
                partial(make_int8_step, rows, columns, rank),
                flops=2.0 * rows * columns * rank,
                bytes=rows * columns * (2 + 16 / GROUP),
                dtype="bfloat16",
            )
        )
    return listed
