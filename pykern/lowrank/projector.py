"""Choosing the subspace: which side is compressed, and the leading singular vectors of a gradient."""

import torch
from torch import Tensor

SIDES = ("std", "reverse_std", "left", "right")


def compresses_right(rows: int, columns: int, side: str) -> bool:
    """Whether `side` projects a rows x columns gradient from the right (R = G P, P is columns x rank).

    "std" compresses the smaller axis, "reverse_std" the larger one, "left" and "right" are as named.
    """
    if side == "left" or side == "right":
        return side == "right"
    return (rows >= columns) == (side == "std")


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
        return torch.linalg.qr(vectors / vectors.norm(dim=0).clamp_min(torch.finfo(vectors.dtype).tiny))[0].contiguous()
    except torch.linalg.LinAlgError:
        return None


def _leading(gram: Tensor, rank: int) -> Tensor:
    vectors = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].flip(1).contiguous()
