"""Saved bytes that leave as codes of one byte an element."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .handing import hand_over, stream_of
from .staging import CODECS, StagingLayout, encodes


class Coding:
    """How bytes of one dtype lie while they are away. What comes back has the codec's error: see StagingLayout."""

    __slots__ = ("_decoded", "_layout")

    def __init__(self, layout: StagingLayout) -> None:
        self._layout = layout
        self._decoded: tuple[StorageWeakRef, int, object] | None = None

    @classmethod
    def of(cls, data: Tensor, dtype: torch.dtype, codec: str | None) -> "Coding | None":
        """Of uint8 `data` that holds elements of `dtype`; None if they are to stay as they are."""
        if not is_lossy(codec) or not encodes(dtype) or data.numel() % dtype.itemsize:
            return None
        return cls(StagingLayout.of([data.view(dtype)], codec))

    @property
    def nbytes(self) -> int:
        return self._layout.nbytes

    def encode(self, data: Tensor) -> Tensor:
        """uint8 [nbytes]."""
        return self._layout.pack([data.view(self._layout.dtypes[0])])

    def decode(self, block: Tensor) -> Tensor:
        """The bytes again; the same memory for all who ask while somebody still uses it."""
        storage = None
        if self._decoded is not None:
            reference, count, stream = self._decoded
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        if storage is None:
            data = self._layout.unpack(block)[0].view(torch.uint8)
            self._decoded = StorageWeakRef(data.untyped_storage()), data.numel(), stream_of(data)
            return data
        return hand_over(torch.empty(0, dtype=torch.uint8, device=block.device).set_(storage, 0, (count,)), stream)


def is_lossy(codec: str | None) -> bool:
    return codec not in (None, "none")


def check_codec(codec: str | None) -> None:
    if codec is not None and codec not in CODECS:
        raise ValueError(f"codec: expected None or one of {', '.join(CODECS)}, got {codec!r}")
