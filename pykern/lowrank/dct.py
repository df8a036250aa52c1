"""The orthonormal DCT-II: C[k, j] = sqrt(2 / n) cos(pi k (2 j + 1) / (2 n)), row 0 divided by sqrt(2)."""

from functools import lru_cache

import torch
from torch import Tensor

from .subspace import Gradient

_PIECE = 1 << 20


@lru_cache(maxsize=64)
def cosines(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """sqrt(2 / n) cos(pi a / (2 n)) for a = 0 ... 4 n - 1, from one quarter wave in float64.

    The angle k (2 j + 1) of a large transform is reduced by integers, modulo 4 n, before it is looked up: as a
    floating point number it would lose what the reduction takes away.
    """
    angles = torch.arange(n + 1, dtype=torch.float64, device="cpu").mul_(torch.pi / (2 * n))
    quarter = angles.cos_().mul_((2 / n) ** 0.5)
    quarter[n] = 0.0
    half = torch.cat([quarter, -quarter[:n].flip(0)])
    return torch.cat([half, half[1 : 2 * n].flip(0)]).to(dtype).to(device)


def vectors(indices: Tensor, n: int, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """The rows `indices` [k] of C as columns, their elements first ... last - 1: [last - first, k]."""
    last = n if last is None else last
    # Products of the two reach 2 n^2.
    integer = torch.int32 if n < 32768 else torch.int64
    wave = cosines(n, indices.device, dtype)
    columns = torch.empty(last - first, indices.shape[0], dtype=dtype, device=indices.device)
    height = max(1, _PIECE // max(1, indices.shape[0]))
    for start in range(first, last, height):
        stop = min(start + height, last)
        odd = torch.arange(2 * start + 1, 2 * stop, 2, dtype=integer, device=indices.device)
        angle = (odd[:, None] * indices.to(integer)).remainder_(4 * n)
        torch.index_select(wave, 0, angle.view(-1), out=columns[start - first : stop - first].view(-1))
    return columns.mul_(torch.ones_like(indices, dtype=torch.float64).masked_fill_(indices == 0, 0.5**0.5).to(dtype))


def scores(gradient: Gradient, power: int) -> Tensor:
    """The l1 norms (`power` 1) or squared l2 norms (2) of the rows of C G, [n]; no full-size temporary.

    C[k, n - 1 - j] = (-1)^k C[k, j], so even rows see the sum of a column's two halves and odd ones their
    difference, and half of the products do.
    """
    n = gradient.matrix.shape[0]
    device, dtype = gradient.matrix.device, gradient.dtype
    total = torch.zeros(n, dtype=dtype, device=device)
    half, middle = (n + 1) // 2, n // 2
    block = max(256, _PIECE // max(1, half))
    for start in range(0, half, block):
        indices = torch.arange(2 * start, min(2 * (start + block), n), device=device)
        even = vectors(indices[0::2], n, dtype, 0, half).mT
        odd = vectors(indices[1::2], n, dtype, 0, half).mT
        for piece in gradient.pieces():
            low, high = piece[:half], piece[middle:].flip(0)
            folded = low + high
            if n % 2:
                # The middle row is its own mirror image.
                folded[-1] = low[-1]
            total[indices[0::2]] += _norm(even @ folded, power)
            total[indices[1::2]] += _norm(odd @ (low - high), power)
    return gradient.summed(total)


def _norm(transformed: Tensor, power: int) -> Tensor:
    return torch.linalg.vector_norm(transformed, ord=1, dim=1) if power == 1 else transformed.square().sum(dim=1)
