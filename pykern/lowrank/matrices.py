"""How a parameter is seen as a matrix with its compressed axis first."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .distributed import Shards, local_gradient, local_tensor
from .quantized import int8_weight

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
        index: its place among all parameters of the optimizer, or of all that optimizer.join has joined, from 0.
        group: of the optimizer.
        state: of the optimizer; for a DTensor this process's shards of it. Written in place once it is made.
        rows, columns: of the weight as a matrix, over all shards.
        rank: of the subspace, at most the smaller of them.
        right: whether the columns are compressed.
        weight: view [n, length] of the parameter, the compressed axis first; of a DTensor, this process's shard, of
            which either axis may be a part.
        grad: likewise of the gradient; None where R is given.
        low: the given R [rank, length].
        shards: how a DTensor lies on its mesh, else None.
    """

    param: Tensor
    index: int
    group: dict
    state: dict
    rows: int
    columns: int
    rank: int
    right: bool
    weight: Tensor
    grad: Tensor | None = None
    low: Tensor | None = None
    shards: Shards | None = None

    @staticmethod
    def of(param: Tensor, index: int, group: dict, state: dict) -> "Job":
        """The job of a parameter, as yet without a gradient."""
        rows, columns = matrix_shape(param.shape)
        right = compresses_right(rows, columns, group["side"])
        shards = Shards.of(param, group["side"], right)
        right = right if shards is None else shards.right
        weight = local_tensor(param.detach())
        # The stand-in of an 8-bit weight has no memory to view, and must not get any.
        weight = compressed_first(weight, right) if int8_weight(param) is not None else _matrix(weight, right)
        state = {name: local_tensor(value) for name, value in state.items()} if shards is not None else state
        return Job(
            param, index, group, state, rows, columns, min(group["rank"], rows, columns), right, weight, shards=shards
        )

    def with_gradient(self) -> "Job":
        """The job with the parameter's gradient."""
        self.grad = _matrix(local_gradient(self.param).to(self.param.dtype), self.right)
        return self

    def with_low(self, low: Tensor) -> "Job":
        """The job with R in place of a gradient."""
        self.low = low.to(self.weight.device)
        return self

    def outline(self, shape: tuple[int, int] | None = None) -> "Job":
        """This job without data, on the device "meta": for what its state looks like, also of a weight [n, length] of
        another shape."""
        weight = torch.empty_like(self.weight, device="meta")
        if shape is not None:
            weight = weight.new_empty(shape)
        return replace(self, param=weight, state={}, weight=weight, grad=None, low=None, shards=None)

    @property
    def compressed(self) -> int:
        """n, the size of the compressed axis over all shards: P has all of it in every process."""
        return self.columns if self.right else self.rows

    @property
    def length(self) -> int:
        """The size of the other axis; of a DTensor's shard in this process."""
        return self.weight.shape[1]

    @property
    def whole_length(self) -> int:
        """The size of the other axis over all shards."""
        return self.rows if self.right else self.columns

    @property
    def partial(self) -> bool:
        """Whether R is the sum of what several processes have of it, each by its part of the compressed axis."""
        return self.shards is not None and self.shards.cut(self.shards.compressed)

    def own(self, matrix: Tensor) -> Tensor:
        """This process's rows of a matrix [n, anything]."""
        return self.shards.own(matrix, 0, self.shards.compressed) if self.partial else matrix

    def write_back(self) -> None:
        """Copies the weight to the parameter if it was no view of it."""
        local = local_tensor(self.param)
        if self.weight.data_ptr() != local.data_ptr():
            matrix = self.weight.mT if self.right else self.weight
            local.copy_(matrix.reshape(local.shape))


def _matrix(tensor: Tensor, right: bool) -> Tensor:
    """A view [n, length] with unit stride along either axis; a copy where there is no such view."""
    matrix = tensor if tensor.dim() == 2 else tensor.reshape(matrix_shape(tensor.shape))
    if 1 not in matrix.stride():
        matrix = matrix.contiguous()
    return compressed_first(matrix, right)
