"""Which bytes of a storage a view needs, and how the view is made again from a copy of them."""

from typing import NamedTuple

import torch
from torch import Tensor

# Copies start at multiples of this, so that a restored view is aligned as the saved one was: some matrix kernels choose
# their path, and with it their rounding, by alignment; those of cuBLAS by as much as this.
ALIGNMENT = 256


class View(NamedTuple):
    """A strided tensor without its storage; the offset counts elements from the storage's start."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> "View":
        return View(tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def span(self) -> tuple[int, int]:
        """First byte, and the byte after the last one."""
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        width = self.dtype.itemsize
        return self.offset * width, (self.offset + last + 1) * width

    def distinct_bytes(self) -> int:
        """Bytes of distinct elements: expanded dimensions count once, overlaps as far as the span tells."""
        count = 1
        for size, stride in zip(self.size, self.stride, strict=True):
            if stride != 0:
                count *= size
        begin, end = self.span()
        return min(count * self.dtype.itemsize, end - begin)

    def region(self, storage_bytes: int) -> tuple[int, int] | None:
        """The byte range of the storage to copy for this view; None if its elements are better gathered.

        The whole storage if the view covers a third of it or more (the two or three siblings of a packed projection
        then share one copy), else the view's span if it covers half of that.
        """
        distinct = self.distinct_bytes()
        if 3 * distinct >= storage_bytes:
            return 0, storage_bytes
        begin, end = self.span()
        if 2 * distinct >= end - begin:
            return begin - begin % ALIGNMENT, end
        return None

    def restore(self, data: Tensor, begin: int) -> Tensor:
        """The view over `data`, a uint8 tensor that holds the storage's bytes from `begin` on."""
        width = self.dtype.itemsize
        offset = (data.storage_offset() - begin) // width + self.offset
        return torch.empty(0, dtype=self.dtype, device=data.device).set_(
            data.untyped_storage(), offset, self.size, self.stride
        )

    def gather(self, tensor: Tensor) -> Tensor:
        """A dense uint8 copy of the distinct elements of `tensor`, which this view describes."""
        dense = torch.empty(self._dense_size(), dtype=self.dtype, device=tensor.device)
        dense.copy_(tensor.as_strided(self._dense_size(), self.stride))
        return dense.view(-1).view(torch.uint8)

    def scatter(self, data: Tensor) -> Tensor:
        """The view from what `gather` returned, with the strides and the alignment that it had."""
        begin, end = self.span()
        width = self.dtype.itemsize
        lead = begin % ALIGNMENT // width
        target = torch.empty(lead + (end - begin) // width, dtype=self.dtype, device=data.device)
        dense = torch.empty(0, dtype=self.dtype, device=data.device).set_(
            data.untyped_storage(), data.storage_offset() // width, self._dense_size()
        )
        target.as_strided(self._dense_size(), self.stride, lead).copy_(dense)
        return target.as_strided(self.size, self.stride, lead)

    def _dense_size(self) -> tuple[int, ...]:
        return tuple(1 if stride == 0 else size for size, stride in zip(self.size, self.stride, strict=True))
