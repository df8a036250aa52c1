"""The leading eigenvectors of a Gram matrix, without those that are not wanted."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .subspace import (
    inner_products,
    inverse_factor,
    lower_times,
    multiply_one,
    narrowed,
    normal,
    orthonormalize,
    polished,
)

DIRECT_SIZE = 384
"""Up to this order all eigenvectors cost no more than an iteration for the leading ones."""

LOST_ENERGY = 6e-5
"""What an iteration may miss of the largest possible energy, by its own estimate."""

_ROUNDS = 4
_DEGREES = 5
"""The most of one round: higher ones let what the vectors have in common grow beyond float32."""

_AIMED_AT = 2.5e-6
"""The share of energy that the degree of the last polynomial is chosen for; what it leaves is about ten times that."""

_NARROW = 0.018
"""How large rounding errors of a bfloat16 Gram matrix may be beside the mean eigenvalue."""

_DAMPED = 1.15
"""The first eigenvalue outside the block, as a multiple of the first unwanted Ritz value of a block that has seen the
matrix once."""

_LOCKED = 0.75
_LOCKING = 128
"""The part of the wanted vectors that is taken as the last polynomial leaves it, if they are _LOCKING or more."""


def iterates(size: int, rank: int) -> bool:
    """Whether an iteration is worth its while: not for small matrices, nor for large shares of one."""
    return size > DIRECT_SIZE and _block(rank) <= size // 2


def all_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors [n, rank] of the largest eigenvalues, the largest first, by the whole decomposition."""
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).contiguous()


def leading_eigenvectors(
    gram: Tensor, rank: int, seed: int = 0, sketch: Callable[[int, int], Tensor] | None = None
) -> Tensor | None:
    """Orthonormal vectors [n, rank] with all but LOST_ENERGY of the energy of the leading eigenvectors of a positive
    semi-definite float32 matrix, nearly these, the largest first; None where that can't be told.

    A block of rank + rank / 4 vectors is rotated to its Ritz vectors and filtered by a Chebyshev polynomial that is
    small on what the block does not hold (Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219, 2006). The residuals
    say of which degree, and at last what is missing. Among the last quarter of the wanted vectors and the surplus
    another rotation chooses. `sketch` (k, seed) gives k random combinations [k, n] of what this is the Gram matrix of:
    a start that is well-conditioned where the eigenvalues span many orders.
    """
    size, block = gram.shape[0], _block(rank)
    trace, norm = torch.stack([gram.diagonal().sum(), torch.linalg.vector_norm(gram)]).tolist()
    # The spectral norm of what rounding the matrix to bfloat16 does, beside the mean of the eigenvalues.
    narrow = 2e-3 * norm * size**0.5 <= _NARROW * trace
    matrix = narrowed(gram) if narrow else gram
    if narrow or sketch is None:
        vectors = multiply_one(matrix, normal(size, block, seed, gram))
    else:
        vectors = sketch(block, seed)
    for number in range(_ROUNDS):
        vectors = _orthonormal(vectors)
        image = multiply_one(matrix, vectors.mT)
        values, rotation = _eigenvectors(inner_products(vectors.to(matrix.dtype).mT, image.mT))
        vectors, image = (multiply_one(rows.to(matrix.dtype), rotation) for rows in (vectors, image))
        outside = (trace - values.sum()) / (size - block)
        bound = values[-1] if number else _DAMPED * values[rank]
        degree, bound, last = _degree(vectors, image, values[:rank], bound, outside)
        if degree == 0:
            return None
        vectors = _filtered(matrix, gram, vectors, image, bound, degree)
        if last:
            vectors = _orthonormal(vectors)
            found = _chosen(gram, vectors, rank, values[:rank].sum())
            if found is not None:
                basis = polished(found)
                return orthonormalize(found) if basis is None else basis
        # What comes now is near its end, where roundings show.
        matrix = gram
    return None


def _chosen(gram: Tensor, vectors: Tensor, rank: int, energy: Tensor) -> Tensor | None:
    """The wanted ones [n, rank] among filtered orthonormal vectors (rows), if they miss no more than LOST_ENERGY of
    this energy."""
    locked = int(_LOCKED * rank) if rank >= _LOCKING else 0
    kept = rank - locked
    first, tail = vectors[:locked], vectors[locked:]
    image = multiply_one(gram, tail.mT)
    values, rotation = _eigenvectors(inner_products(tail.mT, image.mT))
    tail, image = multiply_one(tail, rotation[:, :kept]), multiply_one(image, rotation)
    shared = multiply_one(first.mT, image.mT)
    residuals = image[:kept] - values[:kept, None] * tail - multiply_one(first, shared[:kept].mT)
    # The eigenvalues that the residuals belong to are at most about the smallest here.
    lost = _missed(residuals, values[:kept], values[-1])
    share = lost.sum()
    if locked:
        # Those before miss less each, and what they should have exchanged with the vectors that are dropped.
        share += locked * lost[: max(1, kept // 4)].mean()
        share += (shared[kept:].square().sum(dim=1) / (values[0] - values[kept:])).sum()
    if not bool(share <= LOST_ENERGY * energy):
        return None
    return torch.cat([first, tail]).mT.contiguous()


def _missed(residuals: Tensor, values: Tensor, outside: Tensor) -> Tensor:
    """The energy that Ritz vectors miss by their residuals, if these lie where eigenvalues are `outside`."""
    return residuals.square().sum(dim=1) / torch.maximum(values - outside, values / 16)


def _block(rank: int) -> int:
    return rank + max(16, rank // 4)


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of a symmetric matrix: eigenvalues and the eigenvectors as columns, the largest first."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1).contiguous()


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows with the span of these, orthonormal or nearly so."""
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    inverse = inverse_factor(inner_products(rows.mT))
    return orthonormalize(rows.mT).mT.contiguous() if inverse is None else lower_times(inverse, rows)


def _degree(vectors: Tensor, image: Tensor, values: Tensor, bound: Tensor, outside: Tensor) -> tuple[int, float, bool]:
    """The degree of the polynomial on [0, bound] that comes next, 0 where there is none; the bound; and whether that
    polynomial will do for the wanted Ritz values."""
    rank = values.shape[0]
    lost = _missed(image[:rank] - values[:, None] * vectors[:rank], values, outside)
    reach = torch.acosh((2 * (values + lost) / bound - 1).clamp_min(1.0)).double()
    degrees = torch.arange(1, _DEGREES + 1, device=values.device)
    shares = (lost / torch.cosh(degrees[:, None] * reach).square()).sum(dim=1) / values.sum()
    *shares, bound, largest = torch.cat([shares, bound.double()[None], values[:1].double()]).tolist()
    if not 0 < bound <= 2 * largest < math.inf:
        return 0, bound, False
    degree = next((degree for degree, share in enumerate(shares, 1) if share <= _AIMED_AT), _DEGREES + 1)
    return min(degree, _DEGREES), bound, degree <= _DEGREES


def _filtered(matrix: Tensor, gram: Tensor, vectors: Tensor, image: Tensor, bound: float, degree: int) -> Tensor:
    """The Chebyshev polynomial of this degree on [0, bound], of the matrix, times the vectors (rows); image is the
    matrix times them. `gram` is the matrix without its rounding, for the last product: the others' errors are
    damped by it."""
    before, after = vectors, image.mul_(2 / bound).sub_(vectors)
    for step in range(2, degree + 1):
        following = multiply_one(gram if step == degree else matrix, after.mT)
        before, after = after, following.mul_(4 / bound).sub_(after, alpha=2).sub_(before)
        if step < degree:
            _part(after, 32, before)
    # More of them after the last step: what that leaves a Cholesky factor can make orthonormal.
    if degree > 1:
        _part(after, 32)
        _part(after, 4)
    return after


def _part(after: Tensor, share: int, before: Tensor | None = None) -> None:
    """Takes the leading rows, one in `share`, out of the rows of `after` behind them, and does the same to `before`, so
    that the recurrence goes on: else what rows have of the leading eigenvectors grows until it buries their own."""
    count = -(-after.shape[0] // share)
    leading, others = after[:count], after[count:]
    norms = torch.linalg.vector_norm(leading, dim=1)[:, None]
    unit = leading / norms
    inverse = inverse_factor(unit @ unit.mT)
    if inverse is None:
        return
    steps = (multiply_one(others.mT, unit.mT).mT @ (inverse.mT @ inverse)) / norms.mT
    for rows in (after,) if before is None else (after, before):
        rows[count:] -= multiply_one(rows[:count], steps.mT)
