"""What matrices in 8 or 4 bits mean, in plain PyTorch. A group is 256 neighbours in a row."""

import torch
from torch import Tensor

GROUP = 256


def quantize(values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, columns], not packed, and scale and zero [rows, groups], float32, of values [rows, columns].

    zero is a group's smallest value and scale its range over 2^bits - 1; a code is the nearest. A group whose range is
    not finite has NaN for both, and codes of zero.
    """
    scale, zero = _ranges(values.float(), bits)
    exact = _exact_codes(values.float(), scale, zero)
    return exact.round().clamp_max(2**bits - 1).to(torch.uint8), scale, zero


def quantize_randomly(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantize` to 8 bits, but to one of the two codes beside a value: the upper one where (bits + 1/2) / 2^16 is
    below what is cut off. `bits` are sixteen for each value, as `random_bits` gives them."""
    scale, zero = _ranges(values.float(), 8)
    exact = _exact_codes(values.float(), scale, zero).clamp_max(255)
    below = exact.floor()
    return (below + ((bits + 0.5) / 2**16 < exact - below)).to(torch.uint8), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """zero + scale * code."""
    return _spread(zero, codes.shape[1]).to(dtype) + _spread(scale, codes.shape[1]).to(dtype) * codes.to(dtype)


def pack(codes: Tensor) -> Tensor:
    """Codes of 4 bits two to a byte, the even column in the low half; a row of odd length ends with half a byte."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, 0::2] | padded[:, 1::2] << 4


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The codes that `pack` packed."""
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :columns]


def random_bits(seed: int, step: int, count: int) -> Tensor:
    """Sixteen random bits for each of `count` elements: half e % 8 of Philox4x32-10's four words, the low half of a
    word first, with key `seed` and counter (e / 8, step)."""
    low = 0xFFFFFFFF
    groups = torch.arange(-(-count // 8), dtype=torch.int64)
    counter = [groups & low, groups >> 32 & low, torch.full_like(groups, step), torch.zeros_like(groups)]
    key = [seed & low, seed >> 32 & low]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57  # modulo 2^64
        counter = [
            (second >> 32 & low) ^ counter[1] ^ key[0],
            second & low,
            (first >> 32 & low) ^ counter[3] ^ key[1],
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    halves = [half for word in counter for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).flatten()[:count]


def apply_int8(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    left: Tensor,
    right: Tensor,
    bits: Tensor,
    *,
    step_size: float,
    decay: float = 0.0,
    decay_after: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New codes, scale and zero of W - step_size * left right, with W multiplied by 1 - decay before or after; and that
    weight before it is rounded."""
    weight, update = dequantize(codes, scale, zero, left.dtype), left @ right
    if decay_after:
        weight = (weight - step_size * update) * (1 - decay)
    else:
        weight = weight * (1 - decay) - step_size * update
    return *quantize_randomly(weight, bits.view(codes.shape)), weight


def _groups(values: Tensor, fill: float) -> Tensor:
    rows, columns = values.shape
    groups = -(-columns // GROUP)
    padded = torch.nn.functional.pad(values, (0, groups * GROUP - columns), value=fill)
    return padded.view(rows, groups, GROUP)


def _ranges(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if values.numel() == 0:
        empty = values.new_zeros(values.shape[0], -(-values.shape[1] // GROUP))
        return empty, empty.clone()
    zero = _groups(values, float("inf")).amin(dim=2)
    extent = _groups(values, float("-inf")).amax(dim=2) - zero
    finite = extent.isfinite()
    return (
        torch.where(finite, extent / (2**bits - 1), torch.nan),
        torch.where(finite, zero, torch.nan),
    )


def _spread(per_group: Tensor, columns: int) -> Tensor:
    return per_group.repeat_interleave(GROUP, dim=1)[:, :columns]


def _exact_codes(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    width = _spread(scale, values.shape[1])
    return torch.where(width > 0, (values - _spread(zero, values.shape[1])) / width, 0.0)
