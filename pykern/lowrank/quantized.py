"""Matrices in 8 or 4 bits a value: the raw ops, and the tensors that such a matrix is made of.

A group is 256 neighbours in a row (the last of a row may be shorter), with a float32 zero, its smallest value, and a
float32 scale, its range over the largest code, 255 or 15: a value is zero + scale * code. Q-GaLore's zero is a code; a
group that does not straddle zero, as of the slow vectors of a cosine basis, would then lose its levels, or all of its
values. A group of equal values is exact. A group with a value that is not finite, or of a range that is not, becomes
NaN. Codes of 4 bits lie two to a byte, the even column in the low half, and a row begins at a byte of its own.

quantize_groups(values, codes!, scale!, zero!, found_inf, *, bits)
    Nearest codes of matrices [rows, columns] of one floating-point dtype and of any strides. codes uint8 [rows,
    columns] or [rows, ceil(columns / 2)], scale and zero float32 [rows, ceil(columns / 256)]. With found_inf nothing
    changes.
dequantize_groups(codes, scale, zero, values!, grad_scale, *, bits, adds, maximize)
    The values; with `adds`, values / grad_scale (or its negative if `maximize`) plus what the codes say.
low_rank_apply_int8(codes!, scale!, zero!, left, right, step, seeds, step_factor, lr, found_inf, *, factor,
        weight_decay, decay_after)
    The update of weights [rows, columns] that are kept as 8-bit codes: W - lr * step_factor * factor * left right,
    with left [rows, rank] and right [rank, columns] of any strides, decay before or after. Every group gets the range
    of its new values, and every element one of the two codes beside it, by the bits of low_rank_apply's stochastic
    rounding for element e in [rows, columns] order. A tile of the weight at a time is in float32; on CUDA a block of
    rows of the product.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 256

quantize_groups = torch.ops.pykern.quantize_groups.default
dequantize_groups = torch.ops.pykern.dequantize_groups.default
low_rank_apply_int8 = torch.ops.pykern.low_rank_apply_int8.default


@torch.library.register_fake("pykern::quantize_groups")
@torch.library.register_fake("pykern::dequantize_groups")
@torch.library.register_fake("pykern::low_rank_apply_int8")
def _fake_in_place(*arguments, **keywords):
    """These ops change their arguments and return nothing."""


def quantized_zeros(rows: int, columns: int, bits: int, device: torch.device) -> dict[str, Tensor]:
    """The codes, scale and zero of a matrix of zeros."""
    groups = -(-columns // GROUP)
    return {
        "codes": torch.zeros(rows, columns if bits == 8 else -(-columns // 2), dtype=torch.uint8, device=device),
        "scale": torch.zeros(rows, groups, dtype=torch.float32, device=device),
        "zero": torch.zeros(rows, groups, dtype=torch.float32, device=device),
    }


def parts(states: list[Mapping[str, Tensor]], name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The lists of codes, scales and zeros that states keep under a name."""
    return tuple([state[f"{name}_{part}"] for state in states] for part in ("codes", "scale", "zero"))


class Int8Weight(NamedTuple):
    """A weight [rows, columns] in 8 bits."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as a matrix of its own."""
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        dequantize_groups([self.codes], [self.scale], [self.zero], [weight], None, bits=8, adds=False, maximize=False)
        return weight


def int8_weight(param: Tensor) -> Int8Weight | None:
    """The 8-bit weight that a parameter stands for (Int8Linear); None for an ordinary parameter."""
    return getattr(param, "int8", None)
