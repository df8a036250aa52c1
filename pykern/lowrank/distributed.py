"""Parameters that processes share: shards of a DTensor, and means of local gradients in data parallelism."""

from collections.abc import Iterable, Iterator
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
    """How a low-rank parameter lies on a mesh: one of its axes is in shards, or none.

    Attributes:
        mesh, placements: the parameter's.
        axis: the axis in shards, 0 or 1 of the weight as a matrix; None where all processes hold all of it.
    """

    mesh: object
    placements: tuple
    axis: int | None

    @staticmethod
    def of(param: Tensor) -> "Shards | None":
        """The layout of a parameter; None for one that is no DTensor."""
        if not is_distributed(param):
            return None
        axes = set()
        for placement in param.placements:
            if placement.is_replicate():
                continue
            # A convolution's other axes would interleave the shards' columns.
            if type(placement).__name__ != "Shard" or placement.dim not in ((0, 1) if param.dim() == 2 else (0,)):
                raise NotImplementedError(
                    f"params: expected a DTensor in Shard(0) or, for a matrix, Shard(1), got {param.placements} for "
                    f"{tuple(param.shape)}; give this parameter a group without rank, which works with any placement"
                )
            axes.add(placement.dim)
        if len(axes) > 1:
            raise NotImplementedError(
                f"params: expected one axis of {tuple(param.shape)} in shards, got {param.placements}: the low-rank "
                "gradient would need an all-reduce each step; give this parameter a group without rank"
            )
        return Shards(param.device_mesh, tuple(param.placements), next(iter(axes), None))

    def right(self, side: str) -> bool | None:
        """The side that needs no communication between refreshes: the axis in shards stays whole in R.

        None where any side does.
        """
        if self.axis is None:
            return None
        if side == "full" or side == ("left", "right")[self.axis]:
            raise ValueError(
                f'side: expected "std", "reverse_std" or {("right", "left")[self.axis]!r} for a weight in shards along '
                f"axis {self.axis}, got {side!r}"
            )
        return self.axis == 0

    def _groups(self) -> Iterator[tuple[int, distributed.ProcessGroup]]:
        """The mesh's axes along which there are shards, with this process's group in each."""
        for index, placement in enumerate(self.placements):
            if not placement.is_replicate():
                yield index, self.mesh.get_group(index)

    def lengths(self, whole: int) -> list[int]:
        """The sizes of all shards of an axis, in order: as torch.chunk cuts it; the last ones may be empty."""
        sizes = [whole]
        for index, _ in self._groups():
            count = self.mesh.size(index)
            sizes = [
                min(max(size - i * -(-size // count), 0), -(-size // count)) for size in sizes for i in range(count)
            ]
        return sizes

    @property
    def position(self) -> int:
        """This process's place among the shards, the same for all replicas of one."""
        place = 0
        for index, _ in self._groups():
            place = place * self.mesh.size(index) + self.mesh.get_local_rank(index)
        return place

    def reduce(self, tensor: Tensor, largest: bool = False) -> Tensor:
        """The sum, or the largest value, over all shards; in place."""
        operation = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
        for _, group in self._groups():
            distributed.all_reduce(tensor, operation, group=group)
        return tensor

    def distribute(self, tensor: Tensor, axis: int, size: int):
        """The DTensor of which `tensor` is this process's shard along `axis`, of `size` in all."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [Replicate() if placement.is_replicate() else Shard(axis) for placement in self.placements]
        shape = torch.Size([*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]])
        # No copy: the state is written through the shards. Some of it lies as a transposed weight does.
        outline = torch.empty(shape, device="meta")
        if tensor.dim() == 2 and not tensor.is_contiguous():
            outline = torch.empty(shape[::-1], device="meta").mT
        return DTensor.from_local(tensor, self.mesh, placements, run_check=False, shape=shape, stride=outline.stride())

    def whole(self, matrix: Tensor, length: int) -> Tensor:
        """All columns of a matrix [n, length] of which this process holds its shard's."""
        return matrix if self.axis is None else self.distribute(matrix.contiguous(), 1, length).full_tensor()

    def own(self, matrix: Tensor) -> Tensor:
        """This process's columns of a matrix [n, length] that all processes hold."""
        return matrix.split(self.lengths(matrix.shape[1]), dim=1)[self.position].contiguous()


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes hold, or a DTensor, in the shards of the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    if not is_distributed(tensor):
        tensor = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return tensor.redistribute(like.device_mesh, like.placements)


def average(tensors: Iterable[Tensor], group: distributed.ProcessGroup) -> None:
    """Replaces tensors of one dtype and device by their means over the group, large ones alone, small ones together."""
    count = distributed.get_world_size(group)
    bucket: list[Tensor] = []

    def flush() -> None:
        if bucket:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            distributed.all_reduce(flat, group=group)
            flat.div_(count)
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
            straight.div_(count)
            continue
        if bucket and held + size > _BUCKET_BYTES:
            flush()
            held = 0
        bucket.append(tensor)
        held += size
    flush()


def agree(tensor: Tensor, shared: "Shards | distributed.ProcessGroup") -> None:
    """Makes all processes of a mesh or group hold what the first one holds."""
    groups = [shared]
    if isinstance(shared, Shards):
        groups = [shared.mesh.get_group(index) for index in range(len(shared.placements))]
    for group in groups:
        distributed.broadcast(tensor, group=group, group_src=0)
