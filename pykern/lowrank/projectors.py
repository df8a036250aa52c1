"""Choosing the subspace: the projectors, each a row of a table."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import dct
from .eigenvectors import all_eigenvectors, iterates, leading_eigenvectors
from .subspace import Gradient, normal, orthonormalize, product, signed


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
        reduce: adds up a tensor in place over the processes that share the columns of `matrix`, or None.
    """

    matrix: Tensor
    rank: int
    previous: Tensor | None = None
    seed: int = 0
    right: bool = False
    index: int = 0
    refreshes: int = 0
    reduce: Callable[[Tensor], None] | None = None

    def gradient(self) -> Gradient | None:
        """The gradient, or None where it names no subspace."""
        return Gradient.of(self.matrix, self.reduce)


@dataclass(frozen=True)
class Projector:
    """One way to choose a basis: a function of a Choice, and what is known of its results.

    `choose` gives P [n, rank], float32 (float64 for a float64 gradient), or None where the gradient names no
    subspace; then the basis in use is kept and the next step asks again. It never raises for what is in the
    gradient, and what it gives is finite.

    Attributes:
        orthonormal: P^T P = I.
        basis: where P is made of rows of a fixed matrix, the format of lowrank.bases that keeps their indices; then
            `choose` gives those, int64 [rank].
        first: the projector that takes its place in the first step if refreshes are staggered: cheaper, almost as good.
        by_sums: it can choose by sums over columns, with Choice.reduce; else it needs all columns.
    """

    choose: Callable[[Choice], Tensor | None]
    orthonormal: bool = True
    basis: str | None = None
    first: str | None = None
    by_sums: bool = True


def _finite(choose: Callable[[Choice], Tensor | None]) -> Callable[[Choice], Tensor | None]:
    """Nothing where the choice fails or is not finite."""

    def checked(choice: Choice) -> Tensor | None:
        try:
            basis = choose(choice)
        except torch.linalg.LinAlgError:
            return None
        return basis if basis is not None and bool(torch.isfinite(basis).all()) else None

    return checked


@_finite
def gram(choice: Choice) -> Tensor | None:
    """The leading left singular vectors of the matrix, by its Gram matrix; largest first.

    Of the shorter axis: mapped to the longer one, and made orthonormal even where the gradient's rank is below `rank`.
    Where lowrank.eigenvectors.iterates, they have 0.9999 of the energy of these or more, and of float32 the Gram matrix
    is of the gradient rounded to bfloat16: that costs about 1e-6 of the energy. Else the whole decomposition has them.
    """
    gradient = choice.gradient()
    if gradient is None:
        return None
    rows, length = choice.matrix.shape
    if rows <= length or choice.reduce is not None:
        return signed(_leading(gradient, choice))
    vectors = _leading(Gradient(gradient.matrix.mT, gradient.factor), choice)
    return signed(orthonormalize((gradient.matrix.to(vectors.dtype) * gradient.factor) @ vectors))


def _leading(gradient: Gradient, choice: Choice) -> Tensor:
    """The leading eigenvectors of the Gram matrix, by an iteration where that is shorter and sees to its end."""
    if gradient.dtype == torch.float32 and iterates(gradient.matrix.shape[0], choice.rank):
        # The processes' random combinations would have to differ, and they draw the same numbers.
        sketch = gradient.sketch if choice.reduce is None else None
        try:
            found = leading_eigenvectors(gradient.gram(narrow=True), choice.rank, choice.seed, sketch)
        except torch.linalg.LinAlgError:
            found = None
        if found is not None:
            return found
    return all_eigenvectors(gradient.gram(), choice.rank)


def power(choice: Choice, shifted: bool) -> Tensor | None:
    """One block power step from the basis in use, M = G (G^T P) - shift P, made orthonormal; else "randomized".

    The shift is the mean eigenvalue of G G^T on what P leaves out, at most half the energy of P's weakest vector:
    directions outside shrink by their distance to it. Without the shift this is what LDAdam does at every step, arXiv
    2410.16103. Of float32, the products' factors are rounded to bfloat16, their sums are not.
    """
    if choice.previous is None:
        return randomized(choice)
    gradient = choice.gradient()
    if gradient is None:
        return None
    basis = choice.previous.to(gradient.dtype)
    product, energies, total = gradient.gram_times(basis, narrow=True)
    if shifted and basis.shape[1] < basis.shape[0]:
        outside = (total - energies.sum()) / (basis.shape[0] - basis.shape[1])
        shift = torch.minimum(outside, energies.min() / 2).clamp_min(0.0)
        product = product - shift * basis
    return orthonormalize(product)


@_finite
def randomized(choice: Choice, oversampling: int = 16, iterations: int = 2) -> Tensor | None:
    """The range of the gradient found by normal vectors, rotated to its leading directions; largest first.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1: `rank` + `oversampling` vectors on the
    compressed axis, `iterations` products with G G^T, each made orthonormal.
    """
    gradient = choice.gradient()
    if gradient is None:
        return None
    rows, length = choice.matrix.shape
    block = min(rows, choice.rank + oversampling)
    vectors = normal(rows, block, choice.seed, choice.matrix)
    for _ in range(iterations):
        vectors = orthonormalize(gradient.gram_times(vectors)[0])
    rotation = torch.linalg.eigh(gradient.low_gram(vectors)).eigenvectors
    return signed(product(vectors, rotation[:, -choice.rank :].flip(1)))


@_finite
def svd(choice: Choice) -> Tensor | None:
    """The singular vectors of the thin decomposition, bit for bit and sign for sign what galore_torch and fira take."""
    if choice.gradient() is None:
        return None
    matrix = choice.matrix.mT if choice.right else choice.matrix
    # The packages decompose in float32 whatever the gradient's dtype.
    left, _, right = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
    return right[: choice.rank].mT.contiguous() if choice.right else left[:, : choice.rank].contiguous()


def random(choice: Choice) -> Tensor:
    """Normal numbers / sqrt(rank), not orthonormal: APOLLO, arXiv 2412.05270; Flora, arXiv 2402.03293."""
    return normal(choice.matrix.shape[0], choice.rank, choice.seed, choice.matrix) / choice.rank**0.5


def random_orthonormal(choice: Choice) -> Tensor:
    """An orthonormal basis of a uniformly random subspace: FRUGAL, arXiv 2411.07837; GoLore.

    Made on the CPU, so that every device has the same.
    """
    like = torch.empty(0, dtype=choice.matrix.dtype, device="cpu")
    vectors = normal(choice.matrix.shape[0], choice.rank, choice.seed, like)
    return orthonormalize(vectors).to(choice.matrix.device)


def apollo_torch(choice: Choice) -> Tensor:
    """The draws of the apollo_torch package on the CPU.

    The first seed is the place of the parameter, counted from 1; each next one is the 15th integer that the one
    before yields. The package draws on the gradient's device, so its runs on a GPU have other numbers.
    """
    seed = choice.index + 1
    for _ in range(choice.refreshes):
        generator = torch.Generator().manual_seed(seed)
        seed = int(torch.randint(0, torch.iinfo(torch.int64).max, (15,), generator=generator, device="cpu")[-1])
    shape = (choice.rank, choice.matrix.shape[0])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape if choice.right else shape[::-1], generator=generator, device="cpu")
    basis = drawn / choice.rank**0.5
    return (basis.mT if choice.right else basis).to(choice.matrix.device).contiguous()


def rows(choice: Choice) -> Tensor | None:
    """The rows of the matrix with the largest norms, as indices int64 [rank], the largest first: Grass, 2406.17660."""
    gradient = choice.gradient()
    if gradient is None:
        return None
    return gradient.row_squares().sort(descending=True, stable=True).indices[: choice.rank]


def rows_sampled(choice: Choice) -> Tensor | None:
    """Rows drawn without replacement, in proportion to their norms: Grass's sampling, without its scales.

    A row that is zero is only drawn where too few others are.
    """
    gradient = choice.gradient()
    if gradient is None:
        return None
    # The largest of log(weight) plus Gumbel noise: as many draws without replacement.
    generator = torch.Generator().manual_seed(choice.seed)
    noise = torch.rand(choice.matrix.shape[0], generator=generator, dtype=torch.float64, device="cpu").clamp_min(1e-300)
    weights = gradient.row_squares().double().sqrt().cpu()
    keys = weights.clamp_min(torch.finfo(torch.float64).tiny).log() - (-noise.log()).log()
    return keys.sort(descending=True, stable=True).indices[: choice.rank].to(choice.matrix.device)


def coordinates(choice: Choice) -> Tensor:
    """Uniformly random rows, without replacement: FRUGAL's randperm, arXiv 2411.07837."""
    generator = torch.Generator().manual_seed(choice.seed)
    drawn = torch.randperm(choice.matrix.shape[0], generator=generator, device="cpu")
    return drawn[: choice.rank].to(choice.matrix.device)


def dct_vectors(choice: Choice, power: int) -> Tensor | None:
    """The vectors of the DCT-II along the compressed axis on which the gradient is largest, as indices int64 [rank].

    Largest l1 or l2 norm (`power`) of the rows of C G first: DCT-AdamW, arXiv 2505.17967. Its released code has two
    settings that select from different bases, the vectors of the DCT-II ("makhoul") and of its inverse, the DCT-III
    ("matmul"); this is the DCT-II.
    """
    gradient = choice.gradient()
    if gradient is None:
        return None
    return dct.scores(gradient, power).sort(descending=True, stable=True).indices[: choice.rank]


PROJECTORS: dict[str, Projector] = {
    "gram": Projector(gram, first="randomized"),
    "power": Projector(_finite(partial(power, shifted=True))),
    "plain_power": Projector(_finite(partial(power, shifted=False))),
    "randomized": Projector(randomized),
    "svd": Projector(svd, first="randomized", by_sums=False),
    "dct": Projector(partial(dct_vectors, power=1), basis="dct"),
    "dct_l2": Projector(partial(dct_vectors, power=2), basis="dct"),
    "random": Projector(random, orthonormal=False),
    "random_orthonormal": Projector(random_orthonormal),
    "apollo_torch": Projector(apollo_torch, orthonormal=False),
    "rows": Projector(rows, basis="rows"),
    "rows_sampled": Projector(rows_sampled, basis="rows"),
    "coordinates": Projector(coordinates, basis="rows"),
}


def gram_projector(grad: Tensor, rank: int, right: bool) -> Tensor | None:
    """The first `rank` singular vectors of `grad` as columns; see `gram`."""
    return gram(Choice(grad.mT if right else grad, rank))
