"""The linear algebra of choosing a subspace: Gram products of a gradient, orthonormal bases, leading eigenvectors."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DIRECT_SIZE = 384
"""Up to this order all eigenvectors cost no more than an iteration for the leading ones."""

LOST_ENERGY = 4e-5
"""What an iteration may still miss of the largest possible energy; a quarter above it is the measured truth."""

_PIECE = 1 << 21
_ROUNDS = 6


@dataclass(frozen=True)
class Gradient:
    """A gradient [n, length] to be read in pieces of columns, in float32 or better and at a safe magnitude.

    Attributes:
        matrix: as it came; no full-size copy of it is made.
        factor: brings squares of the elements into range.
        reduce: adds up a tensor in place over the processes that share the columns, or None.
    """

    matrix: Tensor
    factor: float
    reduce: Callable[[Tensor], None] | None = None

    @staticmethod
    def of(matrix: Tensor, reduce: Callable[[Tensor], None] | None = None) -> "Gradient | None":
        """None where the gradient is zero or not finite and so names no subspace."""
        largest = torch.zeros((), dtype=_wide(matrix), device=matrix.device)
        if matrix.numel():  # A process's shard may be empty.
            largest = torch.linalg.vector_norm(matrix.detach(), ord=float("inf"), dtype=_wide(matrix))
        if reduce is not None:
            # The sum bounds the largest of all, and keeps what is not finite.
            reduce(largest)
        size = largest.item()
        if not 0 < size < math.inf:
            return None
        return Gradient(matrix.detach(), 1.0 if 1e-8 < size < 1e8 else 1 / size, reduce)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of everything computed here."""
        return _wide(self.matrix)

    def pieces(self) -> Iterator[Tensor]:
        """Blocks of columns."""
        rows, length = self.matrix.shape
        width = max(256, _PIECE // rows)
        for first in range(0, length, width):
            piece = self.matrix[:, first : first + width].to(self.dtype)
            yield piece if self.factor == 1.0 else piece * self.factor

    def summed(self, tensor: Tensor) -> Tensor:
        if self.reduce is not None:
            self.reduce(tensor)
        return tensor

    def gram(self) -> Tensor:
        """G G^T [n, n]; the half above the diagonal blocks is mirrored, not computed."""
        rows = self.matrix.shape[0]
        gram = torch.zeros(rows, rows, dtype=self.dtype, device=self.matrix.device)
        width = max(128, -(-rows // 8))
        for piece in self.pieces():
            for first in range(0, rows, width):
                last = min(first + width, rows)
                gram[first:last, :last].addmm_(piece[first:last], piece[:last].mT)
        for first in range(width, rows, width):
            last = min(first + width, rows)
            gram[:first, first:last] = gram[first:last, :first].mT
        return self.summed(gram)

    def gram_times(self, vectors: Tensor) -> Tensor:
        """G (G^T vectors) [n, k] without the Gram matrix."""
        product = torch.zeros_like(vectors)
        for piece in self.pieces():
            product.addmm_(piece, piece.mT @ vectors)
        return self.summed(product)

    def low_gram(self, vectors: Tensor) -> Tensor:
        """The Gram matrix [k, k] of vectors^T G."""
        gram = vectors.new_zeros(vectors.shape[1], vectors.shape[1])
        for piece in self.pieces():
            low = vectors.mT @ piece
            gram.addmm_(low, low.mT)
        return self.summed(gram)

    def row_squares(self) -> Tensor:
        """The squared norms of the rows [n]."""
        squares = torch.zeros(self.matrix.shape[0], dtype=self.dtype, device=self.matrix.device)
        for piece in self.pieces():
            squares += piece.square().sum(dim=1)
        return self.summed(squares)


def normal(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Standard normal numbers that depend on the seed alone: drawn on the CPU, so that every device has the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(like.device, _wide(like))


def orthonormalize(vectors: Tensor) -> Tensor:
    """An orthonormal basis [n, k] of what the columns span, each within the span of the columns up to it.

    CholeskyQR twice; the first time again in float64 where float32 was not enough for columns that depend on each
    other; and where the Cholesky factorisation fails in that too, Householder's QR, which completes the basis.
    """
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=0).clamp_min(torch.finfo(vectors.dtype).tiny)
    for dtype in dict.fromkeys((vectors.dtype, torch.float64)):
        basis, _ = _cholesky_qr(vectors, dtype)
        if basis is None:
            continue
        basis, gram = _cholesky_qr(basis, vectors.dtype)
        # So near to the identity, what is left is the rounding of one product.
        if basis is not None and bool(torch.linalg.matrix_norm(gram.fill_diagonal_(0.0)) < 0.5):
            return basis.contiguous()
    return torch.linalg.qr(vectors)[0]


def _cholesky_qr(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The vectors times the inverse factor of their Gram matrix, and that matrix, computed in `dtype`."""
    wide = vectors.to(dtype)
    gram = wide.mT @ wide
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return None, gram
    return torch.linalg.solve_triangular(factor.mT.to(vectors.dtype), vectors, upper=True, left=False), gram


def signed(vectors: Tensor) -> Tensor:
    """The vectors [n, k] with the signs that make the largest element of each positive.

    Solvers leave the signs open, but moments outlive a refresh: they are not to hang on roundings, on how sums were
    split over processes, or on the device.
    """
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def leading_eigenvectors(gram: Tensor, rank: int, seed: int = 0) -> Tensor:
    """The eigenvectors [n, rank] of the largest eigenvalues of a positive semi-definite matrix, the largest first.

    Small matrices and large shares of one are decomposed in full. Else a block of rank + rank / 4 vectors is filtered
    by Chebyshev polynomials that are small on what the block does not hold (Zhou, Saad, Tiago and Chelikowsky, J.
    Comput. Phys. 219, 2006), and rotated to its Ritz vectors, until the residuals bound the energy that the first
    `rank` of them miss by LOST_ENERGY of the whole.
    """
    size = gram.shape[0]
    block = rank + max(16, rank // 4)
    if size <= DIRECT_SIZE or block > size // 2:
        return _direct(gram, rank)
    vectors, degree, lost_before = gram @ normal(size, block, seed, gram), 1, 1.0
    for _ in range(_ROUNDS):
        vectors = orthonormalize(vectors)
        image = gram @ vectors
        small = vectors.mT @ image
        values, rotation = torch.linalg.eigh((small + small.mT) / 2)
        values, rotation = values.flip(0), rotation.flip(1)
        vectors, image = vectors @ rotation, image @ rotation
        lost, largest, bound = _lost(vectors, image, values, rank)
        if lost <= LOST_ENERGY:
            return vectors[:, :rank].contiguous()
        if not 0 < bound < largest:
            break
        # Beyond this the largest component, of rounding errors, would bury the smallest in float32.
        steepness = math.acosh(2 * largest / bound - 1)
        limit = max(2, min(10, int(31.0 / steepness)))
        if degree > 1 and lost < lost_before:
            # The last polynomial shows what a degree gains.
            gained = math.log(lost_before / lost) / degree
            limit = min(limit, max(2, math.ceil(1.2 * math.log(lost / LOST_ENERGY) / gained)))
        degree, lost_before = limit, lost
        vectors = _filter(gram, vectors, image, bound, degree)
    return _direct(gram, rank)


def _direct(gram: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).contiguous()


def _lost(vectors: Tensor, image: Tensor, values: Tensor, rank: int) -> tuple[float, float, float]:
    """The share of energy that the first `rank` Ritz vectors miss, by their residuals and the gap below them; and
    the largest and the smallest Ritz value."""
    residual = (image[:, :rank] - vectors[:, :rank] * values[:rank]).square().sum(dim=0)
    gap = (values[:rank] - values[-1]).clamp_min(torch.finfo(values.dtype).tiny)
    lost = (residual / gap).sum() / values[:rank].sum()
    lost, largest, bound = torch.stack([lost, values[0], values[-1]]).tolist()
    return (lost if math.isfinite(lost) else math.inf), largest, bound


def _filter(gram: Tensor, vectors: Tensor, image: Tensor, bound: float, degree: int) -> Tensor:
    """The Chebyshev polynomial of this degree on [0, bound], of the matrix, times the vectors."""
    before, after = vectors, image * (2 / bound) - vectors
    for _ in range(degree - 1):
        before, after = after, torch.addmm(before + 2 * after, gram, after, beta=-1, alpha=4 / bound)
    return after


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
