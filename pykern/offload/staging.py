"""Many tensors in one block of bytes, so that one large copy moves them off the device and one brings them back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _native

CODECS = ("none", "float8_e4m3", "int8")
"""How elements lie in a block: bit by bit; or one byte each, with a float32 scale per SCALE_BLOCK of them."""

ALIGNMENT = 256
"""Codes and scales of every tensor begin at multiples of this in the block; the bytes between are zero."""

SCALE_BLOCK = 128
"""Consecutive elements that share a scale."""

_ENCODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_pack = torch.ops.pykern.offload_pack.default
_unpack = torch.ops.pykern.offload_unpack.default


@torch.library.register_fake("pykern::offload_pack")
def _(tensors, offsets, codecs, staging):
    return None


@torch.library.register_fake("pykern::offload_unpack")
def _(staging, offsets, codecs, tensors):
    return None


@dataclass(frozen=True)
class StagingLayout:
    """Where a list of tensors lies in one block of bytes. Plain data: it needs no tensor, and may be kept for others.

        layout = StagingLayout.of(saved, codec="float8_e4m3")
        block = layout.pack(saved)          # uint8 [layout.nbytes], on the tensors' device
        host.copy_(block, non_blocking=True)
        ...
        saved = layout.unpack(block)

    Packing and unpacking are one launch for each codec in use and 120 tensors, without waiting for the host, and can
    be captured in a CUDA graph. The block is a pure function of the tensors, the same bit for bit on every device.

    Codecs (elements x of a block of SCALE_BLOCK, absmax the largest finite |x| among them):
        none: bit copy, any dtype.
        float8_e4m3: scale = absmax / 448, x / scale as torch.float8_e4m3fn, rounded to nearest even. The error is at
            most |x| / 16 where |x| >= absmax / 28672, and absmax / 458752 below.
        int8: scale = absmax / 127, rounded to nearest even. The error is at most absmax / 254.
    Encoded elements take 1.03 bytes each. The bounds hold but for float32 roundings (a few 2^-24 of absmax) and the
    rounding to the tensor's dtype; below absmax = 5.3e-36, where the scale would be subnormal, they stay what they
    are there. Float32, bfloat16 and float16 are encoded; tensors of other dtypes are copied bit by bit, whatever codec
    is asked for. A NaN comes back as NaN, and so does an infinity, for which neither codec has a code; the other
    elements of its block are as if it were 0.

    shapes, dtypes, codecs: of each tensor. orders: its dimensions from the slowest to the fastest in memory.
    offsets: the first byte of its codes; its scales follow. nbytes: of the whole block.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    codecs: tuple[str, ...]
    orders: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], codec: str | Sequence[str] = "none") -> "StagingLayout":
        """The layout of `tensors`, in their order. codec: one of CODECS, or one for each tensor.

        Any strides are taken. A dense tensor keeps its order of dimensions (a transposed one comes back transposed);
        views with holes and expanded ones come back contiguous, and packing them costs a copy before.
        """
        tensors = _tensors(tensors)
        wanted = [codec] * len(tensors) if isinstance(codec, str) else list(codec)
        if len(wanted) != len(tensors):
            raise ValueError(f"codec: expected one for each of the {len(tensors)} tensors, got {len(wanted)}")
        for name in wanted:
            if name not in CODECS:
                raise ValueError(f"codec: expected one of {', '.join(CODECS)}, got {name!r}")
        codecs = [name if encodes(tensor.dtype) else "none" for name, tensor in zip(wanted, tensors, strict=True)]
        offsets, end = [], 0
        for tensor, name in zip(tensors, codecs, strict=True):
            offsets.append(end)
            end += encoded_bytes(tensor.numel(), tensor.dtype, name)
        return cls(
            tuple(tuple(tensor.shape) for tensor in tensors),
            tuple(tensor.dtype for tensor in tensors),
            tuple(codecs),
            tuple(_memory_order(tensor) for tensor in tensors),
            tuple(offsets),
            end,
        )

    def pack(self, tensors: Sequence[Tensor], staging: Tensor | None = None) -> Tensor:
        """Writes `tensors`, of the layout's shapes and dtypes, into `staging` and returns it.

        staging: contiguous uint8 of at least `nbytes` on the tensors' device, starting at a multiple of 16 bytes; a
            new one if None. What it has beyond `nbytes` is left alone.
        """
        tensors = self._checked(tensors)
        if staging is None:
            if not tensors:
                return torch.empty(0, dtype=torch.uint8)
            staging = torch.empty(self.nbytes, dtype=torch.uint8, device=tensors[0].device)
        self._check_staging(staging, tensors)
        dense = [t.detach().permute(order).contiguous() for t, order in zip(tensors, self.orders, strict=True)]
        _pack(dense, list(self.offsets), self._codec_numbers(), staging)
        return staging

    def unpack(self, staging: Tensor, tensors: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The tensors that `staging` holds; written into `tensors`, of any strides, where given."""
        if tensors is None:
            self._check_staging(staging, [])
            tensors = []
            for shape, dtype, order in zip(self.shapes, self.dtypes, self.orders, strict=True):
                dense = torch.empty([shape[dim] for dim in order], dtype=dtype, device=staging.device)
                tensors.append(dense.permute(_inverse(order)))
        else:
            tensors = self._checked(tensors)
            self._check_staging(staging, tensors)
        slow_first = [t.detach().permute(order) for t, order in zip(tensors, self.orders, strict=True)]
        dense = [
            t if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format) for t in slow_first
        ]
        _unpack(staging, list(self.offsets), self._codec_numbers(), dense)
        for target, written in zip(slow_first, dense, strict=True):
            if written is not target:
                target.copy_(written)
        return tensors

    def _codec_numbers(self) -> list[int]:
        return [CODECS.index(name) for name in self.codecs]

    def _checked(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensors = _tensors(tensors)
        if len(tensors) != len(self.shapes):
            raise ValueError(f"tensors: expected {len(self.shapes)} as the layout has, got {len(tensors)}")
        for index, (tensor, shape, dtype) in enumerate(zip(tensors, self.shapes, self.dtypes, strict=True)):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"tensors[{index}]: expected the layout's shape {shape}, got {tuple(tensor.shape)}")
            if tensor.dtype != dtype:
                raise TypeError(f"tensors[{index}]: expected the layout's {dtype}, got {tensor.dtype}")
        return tensors

    def _check_staging(self, staging: Tensor, tensors: list[Tensor]) -> None:
        if not isinstance(staging, Tensor) or staging.dtype != torch.uint8:
            got = staging.dtype if isinstance(staging, Tensor) else type(staging).__name__
            raise TypeError(f"staging: expected a uint8 tensor, got {got}")
        if staging.dim() != 1 or not staging.is_contiguous():
            raise ValueError(f"staging: expected one contiguous dimension, got shape {tuple(staging.shape)}")
        if staging.shape[0] < self.nbytes:
            raise ValueError(f"staging: expected at least {self.nbytes} bytes, got {staging.shape[0]}")
        _native.require_kernels(staging, "staging", "offload_pack", "offload_unpack")
        for index, tensor in enumerate(tensors):
            if tensor.device != staging.device:
                raise ValueError(f"tensors[{index}]: expected staging's device {staging.device}, got {tensor.device}")
        if not torch.compiler.is_compiling() and staging.storage_offset() % 16:
            raise ValueError("staging: expected to start at a multiple of 16 bytes; slice it at multiples of 256")


def encodes(dtype: torch.dtype) -> bool:
    """Whether codecs other than "none" have codes for this dtype; others are copied bit by bit."""
    return dtype in _ENCODED_DTYPES


def encoded_bytes(count: int, dtype: torch.dtype, codec: str) -> int:
    """Bytes that `count` elements take in a block: codes, then scales, each up to the next multiple of ALIGNMENT."""
    if codec == "none":
        return aligned(count * dtype.itemsize)
    return aligned(count) + aligned(4 * -(-count // SCALE_BLOCK))


def aligned(count: int) -> int:
    """`count`, up to the next multiple of ALIGNMENT."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def _tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"tensors: expected a list of tensors, got {type(tensors).__name__}")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{index}]: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"tensors[{index}]: expected a dense tensor, got {tensor.layout}")
    return list(tensors)


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions from the slowest to the fastest, if the tensor is then contiguous; else as they are."""
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim)))
    return order if tensor.permute(order).is_contiguous() else tuple(range(tensor.dim()))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


__all__ = ["ALIGNMENT", "CODECS", "SCALE_BLOCK", "StagingLayout", "aligned", "encoded_bytes", "encodes"]
