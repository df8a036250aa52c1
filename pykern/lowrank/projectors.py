"""Choosing the subspace: the projectors, each a row of a table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """What a projector may look at when it chooses a basis.

    Attributes:
        matrix: the gradient [n, length], the axis to be compressed first; not to be written.
        rank: vectors wanted, at most min(n, length).
        previous: the basis in use [n, rank], or None at first.
        seed: of this parameter and this refresh, for projectors that draw.
        right: `matrix` is the transposed gradient.
        index: the parameter's place among all of the optimizer, from 0.
        refreshes: choices before this one.
        reduce: adds up a tensor in place over the processes that share the columns of the gradient, where `matrix` has
            this process's only; None where it has all.
    """

    matrix: Tensor
    rank: int
    previous: Tensor | None = None
    seed: int = 0
    right: bool = False
    index: int = 0
    refreshes: int = 0
    reduce: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Projector:
    """One way to choose a basis: a function of a Choice, and what is known of its results.

    `choose` gives P [n, rank], float32 (float64 for a float64 gradient), or None where the gradient names no
    subspace; then the basis in use is kept and the next step asks again. Where P is made of whole rows of a fixed
    matrix it gives what the format `basis` of lowrank.bases keeps of them. `by_sums`: it can choose by sums over the
    columns, with Choice.reduce; else it always gets all columns.
    """

    choose: Callable[[Choice], Tensor | None]
    orthonormal: bool = True
    basis: str | None = None
    by_sums: bool = False


def gram_projector(grad: Tensor, rank: int, right: bool) -> Tensor | None:
    """The first `rank` singular vectors of `grad` as columns, by the eigenvectors of its Gram matrix.

    Orthonormal whatever the gradient's rank is; leading vector first. float32 (float64 for a float64
    gradient), in memory of its own. None, and never an error, where the gradient names no subspace: it
    is zero or has a non-finite element, or the eigensolver does not converge.
    """
    matrix = grad.detach().to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    if not right:
        matrix = matrix.mT
    # The columns of `matrix` are compressed. Scaled to 1, the squares neither overflow nor vanish.
    largest = torch.linalg.vector_norm(matrix, ord=float("inf"))
    if not (torch.isfinite(largest) & (largest > 0)):
        return None
    matrix = matrix / largest
    try:
        if matrix.shape[0] >= matrix.shape[1]:
            return _leading(matrix.mT @ matrix, rank)
        # The shorter axis gives the smaller eigenproblem; its vectors map to the longer one, and QR
        # makes those orthonormal even where the gradient's rank is below `rank`.
        vectors = matrix.mT @ _leading(matrix @ matrix.mT, rank)
        return signed(torch.linalg.qr(vectors / vectors.norm(dim=0).clamp_min(torch.finfo(vectors.dtype).tiny))[0])
    except torch.linalg.LinAlgError:
        return None


def _leading(gram: Tensor, rank: int) -> Tensor:
    vectors = torch.linalg.eigh(gram).eigenvectors
    return signed(vectors[:, -rank:].flip(1))


def signed(vectors: Tensor) -> Tensor:
    """The vectors [n, rank] with the signs that make the largest element of each positive, in memory of its own.

    Solvers leave the signs open, but moments are kept over a refresh: so that they don't hang on roundings, the way a
    sum was split over processes, or the device.
    """
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors).contiguous()


def _gram(choice: Choice) -> Tensor | None:
    if choice.reduce is None:
        return gram_projector(choice.matrix.mT, choice.rank, right=True)
    matrix = choice.matrix.to(torch.promote_types(choice.matrix.dtype, torch.float32))
    # The sum of all processes' largest elements: as good a scale as the largest, and zero or not finite with it.
    largest = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
    largest = choice.reduce(largest)
    if not (torch.isfinite(largest) & (largest > 0)):
        return None
    matrix = matrix / largest
    try:
        return _leading(choice.reduce(matrix @ matrix.mT), choice.rank)
    except torch.linalg.LinAlgError:
        return None


PROJECTORS: dict[str, Projector] = {
    "gram": Projector(_gram, by_sums=True),
}
