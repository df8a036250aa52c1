"""The linear algebra of choosing a subspace: Gram products of a gradient, orthonormal bases."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import low_rank_project

_PIECE = 1 << 22


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
            # Twice as fast as a norm, and NaN stays too.
            least, most = torch.aminmax(matrix.detach())
            largest = torch.maximum(-least, most).to(_wide(matrix))
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

    def gram(self, narrow: bool = False) -> Tensor:
        """G G^T [n, n]; `narrow`: of float32, its elements rounded to bfloat16 first, the sums not rounded."""
        gram = None
        for piece in self.pieces():
            product = inner_products((narrowed(piece) if narrow else piece).mT)
            gram = product if gram is None else gram.add_(product)
        if gram is None:  # A process's shard may be empty.
            gram = torch.zeros(2 * self.matrix.shape[:1], dtype=self.dtype, device=self.matrix.device)
        return self.summed(gram)

    def gram_times(self, vectors: Tensor, narrow: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """G (G^T vectors) [n, k] without the Gram matrix; the squared norms of the columns of G^T vectors, and of G.

        `narrow`: of float32, factors rounded to bfloat16; the sums are not rounded.
        """
        columns = narrowed(vectors) if narrow else vectors
        product, sums = torch.zeros_like(vectors).mT.contiguous(), vectors.new_zeros(vectors.shape[1] + 1)
        for piece in self.pieces():
            piece = narrowed(piece) if narrow else piece
            low = multiply_one(piece, columns)
            sums[:-1] += torch.linalg.vector_norm(low, dim=1).square()
            sums[-1] += torch.linalg.vector_norm(piece, dtype=self.dtype).square()
            product += multiply_one(piece.mT, low.mT)
        self.summed(sums)
        return self.summed(product).mT.contiguous(), sums[:-1], sums[-1]

    def sketch(self, count: int, seed: int) -> Tensor:
        """Random combinations of the columns, as rows [count, n]; of float32, factors are rounded to bfloat16."""
        length = self.matrix.shape[1]
        numbers, product, first = normal(length, count, seed, self.matrix), 0.0, 0
        for piece in self.pieces():
            last = first + piece.shape[1]
            product = product + multiply_one(narrowed(piece).mT, numbers[first:last])
            first = last
        return product

    def low_gram(self, vectors: Tensor) -> Tensor:
        """The Gram matrix [k, k] of vectors^T G."""
        gram = vectors.new_zeros(vectors.shape[1], vectors.shape[1])
        for piece in self.pieces():
            gram += inner_products(multiply_one(piece, vectors).mT)
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
    return torch.randn(rows, columns, generator=generator, device="cpu").to(like.device, _wide(like))


def narrowed(tensor: Tensor) -> Tensor:
    """Float32 as bfloat16, float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.bfloat16()


def contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Both at once is several times slower, where it transposes.
    return tensor.to(dtype).contiguous()


def multiply(matrices: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """vectors^T matrix [k, length] of each pair, of one dtype, each vectors [n, k] contiguous; float32 or float64.

    The op of the optimizer's projection: in float32 as fast as the processor is, where torch's product may not be, and
    of bfloat16 with sums that are not rounded.
    """
    matrices = [matrix if 1 in matrix.stride() else matrix.contiguous() for matrix in matrices]
    low = [
        torch.empty(columns.shape[1], matrix.shape[1], dtype=_wide(matrix), device=matrix.device)
        for matrix, columns in zip(matrices, vectors, strict=True)
    ]
    low_rank_project(matrices, vectors, None, low, [], maximize=False)
    return low


def multiply_one(matrix: Tensor, vectors: Tensor) -> Tensor:
    """`multiply` of one pair, the vectors in whatever layout and dtype."""
    return multiply([matrix], [contiguous(vectors, matrix.dtype)])[0]


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of matrices of one dtype, float32 or float64: the same for any number of threads, as torch's product
    is not where an axis is short."""
    return multiply_one(right, left.mT)


def inner_products(columns: Tensor, images: Tensor | None = None) -> Tensor:
    """columns^T columns [k, k] of vectors [n, k], or images^T columns, of their images under a symmetric matrix.

    The half above the diagonal blocks is mirrored, not computed. Images of the later columns make the other: where
    vectors are sorted, the largest first, these are the smaller, and so are their roundings.
    """
    images = columns if images is None else images
    size = columns.shape[1]
    blocks = _blocks(size, 16)
    strips = multiply(
        [columns[:, :last] for _, last in blocks],
        [contiguous(images[:, first:last], columns.dtype) for first, last in blocks],
    )
    if len(strips) == 1:
        return strips[0]
    products = torch.empty(size, size, dtype=_wide(columns), device=columns.device)
    for (first, last), strip in zip(blocks, strips, strict=True):
        products[first:last, :last] = strip
        products[:first, first:last] = strip[:, :first].mT
    return products


def lower_times(lower: Tensor, rows: Tensor) -> Tensor:
    """A lower triangular matrix [n, n] times rows [n, length], without most of the products with zeros."""
    blocks = _blocks(rows.shape[0], 4)
    factors = [contiguous(lower[first:last, :last].mT, rows.dtype) for first, last in blocks]
    return torch.cat(multiply([rows[:last] for _, last in blocks], factors))


def _blocks(size: int, most: int) -> list[tuple[int, int]]:
    """Up to `most` ranges of 128 or more."""
    width = max(128, -(-size // most))
    return [(first, min(first + width, size)) for first in range(0, size, width)]


def orthonormalize(vectors: Tensor) -> Tensor:
    """An orthonormal basis [n, k] of what the columns span, each within the span of the columns up to it.

    CholeskyQR twice. Where float32 is not enough for columns that depend on each other, the first eighth is made
    orthonormal by Householder's QR and taken out of the others first: what columns after a product have in common is
    mostly the leading few. Then float64; and where the Cholesky factorisation fails in that too, Householder's QR,
    which completes the basis.
    """
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=0).clamp_min(torch.finfo(vectors.dtype).tiny)
    for attempt in (_cholesky_qr, _split_qr, _wide_qr):
        basis = attempt(vectors)
        basis = None if basis is None else polished(basis)
        if basis is not None:
            return basis
    return torch.linalg.qr(vectors)[0].contiguous()


def polished(basis: Tensor) -> Tensor | None:
    """Nearly orthonormal columns made orthonormal; None where they are too far from it."""
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    gram = inner_products(basis)
    error = torch.linalg.matrix_norm(gram - identity).item()
    if not error < 0.5:
        return None
    # A step of Newton-Schulz leaves 3 / 4 error^2.
    near = error < (1e-3 if basis.dtype == torch.float32 else 1e-8)
    if near:
        rows = multiply_one(basis.mT, 1.5 * identity - 0.5 * gram)
    else:
        rows = lower_times(inverse_factor(gram), basis.mT)
    return rows.mT.contiguous()


def inverse_factor(gram: Tensor) -> Tensor | None:
    """The inverse of the lower Cholesky factor; None where there is none."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    return None if failed else _inverse(factor)


def _inverse(factor: Tensor) -> Tensor:
    """Of a lower triangular matrix, by its quarters: half of a solver's work, and most of it in products."""
    size = factor.shape[0]
    if size <= 128:
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity, upper=False)
    half = size // 2
    inverse = torch.zeros_like(factor)
    inverse[:half, :half], inverse[half:, half:] = _inverse(factor[:half, :half]), _inverse(factor[half:, half:])
    inverse[half:, :half] = inverse[half:, half:] @ (factor[half:, :half] @ inverse[:half, :half]).neg_()
    return inverse


def _cholesky_qr(vectors: Tensor) -> Tensor | None:
    """The vectors times the inverse factor of their Gram matrix."""
    inverse = inverse_factor(inner_products(vectors))
    return None if inverse is None else lower_times(inverse, vectors.mT).mT.contiguous()


def _split_qr(vectors: Tensor) -> Tensor | None:
    first = vectors.shape[1] // 8
    lead, others = torch.linalg.qr(vectors[:, :first])[0], vectors[:, first:]
    for _ in range(2):
        others = others - lead @ (lead.mT @ others)
        others = others / torch.linalg.vector_norm(others, dim=0).clamp_min(torch.finfo(vectors.dtype).tiny)
    others = _cholesky_qr(others)
    return None if others is None else torch.cat([lead, others], dim=1)


def _wide_qr(vectors: Tensor) -> Tensor | None:
    basis = vectors
    for _ in range(2):
        wide = basis.double()
        inverse = inverse_factor(wide.mT @ wide)
        if inverse is None:
            return None
        basis = basis @ inverse.mT.to(basis.dtype)
    return basis.contiguous()


def signed(vectors: Tensor) -> Tensor:
    """The vectors [n, k] with the signs that make the largest element of each positive.

    Solvers leave the signs open, but moments outlive a refresh: they are not to hang on roundings, on how sums were
    split over processes, or on the device.
    """
    least, most = vectors.amin(dim=0), vectors.amax(dim=0)
    return torch.where(-least > most, -vectors, vectors)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
