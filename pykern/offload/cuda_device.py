"""A CUDA device as the engine for streams sees it."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, cuda

from .. import _native
from .host_arena import map_pages
from .near import cpus_near, running_on

_pack = torch.ops.pykern.offload_pack.default

# Measured waits that are kept until somebody asks; beyond it, those that have ended are added up.
_MOST_WAITS = 256


class CudaDevice:
    """A StreamDevice of torch.cuda: copies on streams of its own, host memory mapped here and registered with CUDA.

    Registering takes memory as it is; torch's own pinned memory, which is taken where registering fails (as in some
    sandboxes), is rounded up to a power of two. The memory lies at the processor that the device is nearest to, where
    this process may run there.

    device: by default the current one. directions: 2 streams for copies if both directions run at once, 1 if they
    take turns, as is better where two devices share a switch.
    """

    def __init__(self, device: torch.device | str | None = None, directions: int = 2) -> None:
        if directions not in (1, 2):
            raise ValueError(f"directions: expected 1 or 2, got {directions}")
        device = torch.device("cuda" if device is None else device)
        if device.type != "cuda":
            raise ValueError(f"device: expected a CUDA device for storage='pinned', got {device}")
        if not cuda.is_available():
            raise RuntimeError("storage: 'pinned' needs a CUDA device, and torch finds none; use 'memory' or 'file'")
        index = cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.name = str(self.device)
        self.out_stream = cuda.Stream(self.device)
        self.back_stream = self.out_stream if directions == 1 else cuda.Stream(self.device)
        self._registered: set[int] = set()
        self._waits: deque[tuple[cuda.Event, cuda.Event]] = deque()
        self._stalled = 0.0

    def accepts(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def is_capturing(self) -> bool:
        return cuda.is_current_stream_capturing()

    def compute_stream(self) -> cuda.Stream:
        return cuda.current_stream(self.device)

    def record(self, stream: cuda.Stream) -> cuda.Event:
        event = cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: cuda.Stream, event: cuda.Event, measured: bool = False) -> None:
        if not measured or event.query():
            stream.wait_event(event)
            return
        before, after = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(event)
        after.record(stream)
        self._waits.append((before, after))
        if len(self._waits) > _MOST_WAITS:
            self.stall_seconds()

    def is_complete(self, event: cuda.Event) -> bool:
        return event.query()

    def synchronize(self, event: cuda.Event) -> None:
        event.synchronize()

    def stall_seconds(self) -> float:
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            self._stalled += before.elapsed_time(after) / 1e3
        return self._stalled

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def free(self, block: Tensor, stream: cuda.Stream) -> None:
        # The allocator gives memory back to the stream that it was allocated in when the last reference goes. This has
        # it wait for `stream` if that is another one, and else does nothing, so when memory is free stays determined.
        block.record_stream(stream)

    def copy(self, stream: cuda.Stream, target: Tensor, source: Tensor) -> None:
        with cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def pack(self, parts: Sequence[Tensor], offsets: Sequence[int], block: Tensor) -> None:
        if "offload_pack" in _native.cuda_ops:
            _pack(list(parts), list(offsets), [0] * len(parts), block)
            return
        places = [block[offset : offset + part.numel()] for part, offset in zip(parts, offsets, strict=True)]
        torch._foreach_copy_(places, list(parts))

    def allocate_host(self, nbytes: int) -> Tensor:
        memory = map_pages(nbytes)
        # Without the guard, a process that uses another device alone would begin to use the first one, too. Flags 0:
        # the memory is pinned for every device.
        with cuda.device(self.device), running_on(cpus_near(cuda.get_device_properties(self.device))):
            error = int(cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
        if error == 0:
            self._registered.add(memory.data_ptr())
            return memory
        self._forget_error()
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            self._forget_error()
            raise MemoryError(f"no pinned memory for {nbytes} bytes on the host: {error}") from error

    def _forget_error(self) -> None:
        """A failed call leaves its error for whoever asks CUDA next: better here than an innocent kernel."""
        try:
            torch.zeros(1, device=self.device)
        except RuntimeError:
            pass

    def free_host(self, memory: Tensor) -> None:
        if memory.data_ptr() in self._registered:
            self._registered.remove(memory.data_ptr())
            with cuda.device(self.device):
                cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def touch_host(self, memory: Tensor, writes: bool) -> None:
        pass

    def forget_host(self, memory: Tensor) -> None:
        pass


__all__ = ["CudaDevice"]
