"""How a parameter is seen as a matrix with its compressed axis first."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

SIDES = ("std", "reverse_std", "left", "right", "full")


def compresses_right(rows: int, columns: int, side: str) -> bool:
    """Whether `side` projects a rows x columns gradient from the right (R = G P, P is columns x rank).

    "std" compresses the smaller axis, "reverse_std" the larger one, "left" and "right" are as named; "full"
    compresses both, the rows first.
    """
    if side in ("left", "right", "full"):
        return side == "right"
    return (rows >= columns) == (side == "std")


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight of two or more axes: all but the first are columns, as a convolution has them."""
    rows = shape[0]
    columns = 1
    for size in shape[1:]:
        columns *= size
    return rows, columns


def compressed_first(matrix: Tensor, right: bool) -> Tensor:
    """A view [n, length] of a matrix [rows, columns], its compressed axis first."""
    return matrix.mT if right else matrix


@dataclass
class Job:
    """One low-rank parameter of one step.

    Attributes:
        param: the parameter, of any number of axes from two on.
        index: its place among all parameters of the optimizer, from 0.
        group, state: of the optimizer.
        rows, columns: of the weight seen as a matrix.
        rank: of the subspace, at most the smaller of them.
        right: whether the columns are compressed.
        weight, grad: views [n, length] of the parameter and its gradient, the compressed axis first.
        copied: the weight is a copy, to be written back.
    """

    param: Tensor
    index: int
    group: dict
    state: dict
    rows: int
    columns: int
    rank: int
    right: bool
    weight: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    copied: bool = field(init=False)

    @staticmethod
    def of(param: Tensor, index: int, group: dict, state: dict) -> "Job":
        rows, columns = matrix_shape(param.shape)
        right = compresses_right(rows, columns, group["side"])
        job = Job(param, index, group, state, rows, columns, min(group["rank"], rows, columns), right)
        weight = param.detach().reshape(rows, columns)
        if 1 not in weight.stride():
            weight = weight.contiguous()
        job.copied = weight.data_ptr() != param.data_ptr()
        grad = param.grad.to(param.dtype).reshape(rows, columns)
        if 1 not in grad.stride():
            grad = grad.contiguous()
        job.weight, job.grad = compressed_first(weight, right), compressed_first(grad, right)
        return job

    @property
    def compressed(self) -> int:
        """n, the size of the compressed axis."""
        return self.columns if self.right else self.rows

    @property
    def length(self) -> int:
        """The size of the other axis."""
        return self.rows if self.right else self.columns

    def write_back(self) -> None:
        """Copies the weight to the parameter if it was no view of it."""
        if self.copied:
            matrix = self.weight.mT if self.right else self.weight
            self.param.copy_(matrix.reshape(self.param.shape))
