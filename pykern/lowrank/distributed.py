"""Parameters that processes share: shards of a DTensor, and means of local gradients in data parallelism."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

_BUCKET_BYTES = 32 * 2**20


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; told without importing those, which takes long."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "to_local")


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard if it is a DTensor, itself else."""
    if not is_distributed(tensor):
        return tensor
    local = tensor.to_local()
    # A shard may still be under way from a collective.
    return local.wait() if hasattr(local, "wait") else local


def local_gradient(param: Tensor) -> Tensor:
    """What this process holds of a parameter's gradient, laid out on the mesh as the parameter is."""
    grad = param.grad
    if is_distributed(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_tensor(grad)


@dataclass(frozen=True)
class Shards:
    """How a low-rank parameter lies on a mesh. Axes are those of the weight as a matrix: 0 its rows, 1 its columns.

    Attributes:
        mesh, placements: the parameter's.
        right: whether the columns are compressed, else the rows.
    """

    mesh: object
    placements: tuple
    right: bool

    @staticmethod
    def of(param: Tensor, side: str, otherwise: bool) -> "Shards | None":
        """The layout of a parameter; None for one that is no DTensor. `otherwise`: `right` where shards don't say.

        "std" and "reverse_std" give way to shards: what is in shards along one axis is compressed along the other, so
        that R is in shards too, and is nothing to be added up. In shards along both axes, the one is compressed that
        the mesh's last dimension cuts, by convention the one with the fastest links (tensor parallelism).
        """
        if not is_distributed(param):
            return None
        shape = tuple(param.shape)
        axes = []
        for placement in param.placements:
            if placement.is_replicate():
                continue
            # The second is fully_shard's of what tensor parallelism has cut before. A convolution's other axes would
            # interleave the shards' columns.
            known = type(placement).__name__ in ("Shard", "_StridedShard")
            if not known or placement.dim not in ((0, 1) if len(shape) == 2 else (0,)):
                raise NotImplementedError(
                    f"params: expected a DTensor in Shard(0) or, for a matrix, Shard(1), got {param.placements} for "
                    f"{shape}; give this parameter a group without rank, which works with any placement"
                )
            axes.append(placement.dim)
        if axes and side == "full":
            raise ValueError(
                f'side: "full" needs all of a weight in every process, and one of {shape} lies in shards as '
                f'{param.placements}; expected one of "std", "left", "right"'
            )
        right = otherwise
        if axes and side not in ("left", "right"):
            right = axes[-1] == 1 if len(set(axes)) == 2 else axes[0] == 0
        return Shards(param.device_mesh, tuple(param.placements), right)

    @property
    def compressed(self) -> int:
        """The axis that is compressed."""
        return int(self.right)

    @property
    def along(self) -> int:
        """The axis that R has too."""
        return 1 - self.compressed

    def cut(self, axis: int) -> bool:
        """Whether an axis is in shards."""
        return bool(self._dimensions(axis))

    def _dimensions(self, axis: int) -> list[int]:
        """The mesh's dimensions that cut an axis, in the order in which they do.

        That of the mesh, but for fully_shard of what tensor parallelism has cut before: its placement is strided, on an
        earlier dimension.
        """
        order: list[int] = []
        for dimension, placement in reversed(list(enumerate(self.placements))):
            if not placement.is_replicate() and placement.dim == axis:
                order.insert(len(order) if hasattr(placement, "split_factor") else 0, dimension)
        return order

    def own(self, tensor: Tensor, dim: int, axis: int) -> Tensor:
        """A view of this process's part of a tensor whose dimension `dim` is an axis of the weight."""
        start, size = 0, tensor.shape[dim]
        for dimension in self._dimensions(axis):
            # As torch.chunk cuts; the last parts may be empty.
            part = -(-size // self.mesh.size(dimension))
            before = min(part * self.mesh.get_local_rank(dimension), size)
            start, size = start + before, min(part, size - before)
        return tensor.narrow(dim, start, size)

    @property
    def position(self) -> int:
        """This process's place among the shards, the same for all replicas of one."""
        place = 0
        for dimension, placement in enumerate(self.placements):
            if not placement.is_replicate():
                place = place * self.mesh.size(dimension) + self.mesh.get_local_rank(dimension)
        return place

    def reduce(self, tensor: Tensor, largest: bool = False) -> Tensor:
        """The sum, or the largest value, over the processes that share R's columns; in place."""
        operation = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
        for dimension in self._dimensions(self.along):
            distributed.all_reduce(tensor, operation, group=self.mesh.get_group(dimension))
        return tensor

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sums over the processes that share the compressed axis, as R of their parts is to be; in place."""
        for dimension in self._dimensions(self.compressed):
            add_up(tensors, self.mesh.get_group(dimension))

    def distribute(self, tensor: Tensor, axes: Mapping[int, int], sizes: tuple[int, int]):
        """The DTensor of which `tensor` is this process's part.

        Args:
            axes: {axis of the weight: the tensor's dimension that is that axis}.
            sizes: of the weight's axes, over all shards.
        """
        from torch.distributed.tensor import DTensor, Replicate

        placements = [
            Replicate()
            if placement.is_replicate() or placement.dim not in axes
            else _on(placement, axes[placement.dim])
            for placement in self.placements
        ]
        shape = list(tensor.shape)
        for axis, dim in axes.items():
            shape[dim] = sizes[axis]
        # No copy: the state is written through the shards. Some of it lies as a transposed weight does.
        outline = torch.empty(shape, device="meta")
        if tensor.dim() == 2 and not tensor.is_contiguous():
            outline = torch.empty(shape[::-1], device="meta").mT
        return DTensor.from_local(
            tensor, self.mesh, placements, run_check=False, shape=outline.shape, stride=outline.stride()
        )

    def gathered(self, matrix: Tensor, axis: int, dim: int, size: int) -> Tensor:
        """All of a matrix whose dimension `dim` is an axis of the weight, of `size` in all."""
        if not self.cut(axis):
            return matrix
        sizes = (size, size)
        return self.distribute(matrix.contiguous(), {axis: dim}, sizes).full_tensor()


def _on(placement, dim: int):
    """The placement of another tensor's dimension that is cut alike."""
    if hasattr(placement, "split_factor"):
        return type(placement)(dim, split_factor=placement.split_factor)
    return type(placement)(dim)


def like_shards(local: Tensor, like: Tensor) -> Tensor:
    """The DTensor of which `local` is this process's part, in the shards of a DTensor of the same shape."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, also of a DTensor."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes hold, or a DTensor, in the shards of the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    if is_distributed(tensor) and tensor.device_mesh != like.device_mesh:
        tensor = tensor.full_tensor()
    if not is_distributed(tensor):
        tensor = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return tensor.redistribute(like.device_mesh, like.placements)


def add_up(tensors: Iterable[Tensor], group: distributed.ProcessGroup, divisor: int = 1) -> None:
    """Replaces tensors of one dtype and device by their sums over the group, over `divisor`.

    Large ones are sent alone, small ones together.
    """
    bucket: list[Tensor] = []

    def flush() -> None:
        if bucket:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            distributed.all_reduce(flat, group=group)
            flat.div_(divisor)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))
            bucket.clear()

    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        straight = tensor if tensor.is_contiguous() or tensor.dim() < 2 else tensor.mT
        if size >= _BUCKET_BYTES and straight.is_contiguous():
            distributed.all_reduce(straight, group=group)
            straight.div_(divisor)
            continue
        if bucket and held + size > _BUCKET_BYTES:
            flush()
            held = 0
        bucket.append(tensor)
        held += size
    flush()


def average(tensors: Iterable[Tensor], group: distributed.ProcessGroup) -> None:
    """Replaces tensors of one dtype and device by their means over the group."""
    add_up(tensors, group, distributed.get_world_size(group))


def agree(tensor: Tensor, shared: "Shards | distributed.ProcessGroup") -> None:
    """Makes all processes of a mesh or group hold what the first one holds."""
    groups = [shared]
    if isinstance(shared, Shards):
        groups = [shared.mesh.get_group(index) for index in range(len(shared.placements))]
    for group in groups:
        distributed.broadcast(tensor, group=group, group_src=0)
