"""A device with streams that isn't there: copies on threads, as slow as told, beside computation on the CPU."""

import ctypes
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _native  # noqa: F401  (registers the ops)
from .host_arena import map_pages

_pack = torch.ops.pykern.offload_pack.default


class SimulatedStream:
    """A thread that does one thing after the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self.work,), name=f"pykern {name}", daemon=True)
        self._thread.start()
        self._ending = weakref.finalize(self, self.work.put, None)

    def __repr__(self) -> str:
        return f"SimulatedStream({self.name!r})"


def _serve(work: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (step := work.get()) is not None:
        step()


class SimulatedDevice:
    """A StreamDevice in real time: tensors and computation are the CPU's, so the computing stream is the caller.

    Copies run on threads, and each takes `latency + nbytes / bandwidth` seconds, or as long as the CPU needs if that
    is longer. It serves to try on a machine without an accelerator whether copies hide behind computation.

    bandwidth: bytes per second of one direction; None: as fast as the CPU copies. latency: seconds of each copy.
    directions: 2 if both run at once, 1 if they take turns. host_bytes: how much memory `allocate_host` has.
    """

    name = "the simulated device"

    def __init__(
        self,
        *,
        bandwidth: float | None = None,
        latency: float = 0.0,
        directions: int = 2,
        host_bytes: int | None = None,
    ) -> None:
        if directions not in (1, 2):
            raise ValueError(f"directions: expected 1 or 2, got {directions}")
        self.bandwidth, self.latency = bandwidth, latency
        self.out_stream = SimulatedStream("copies out")
        self.back_stream = self.out_stream if directions == 1 else SimulatedStream("copies back")
        self._host_left = host_bytes
        self._stalled = 0.0

    def compute_stream(self) -> str:
        return "the caller"

    def accepts(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def is_capturing(self) -> bool:
        return False

    def record(self, stream: SimulatedStream | str) -> threading.Event:
        event = threading.Event()
        if isinstance(stream, str):
            event.set()
        else:
            stream.work.put(event.set)
        return event

    def wait(self, stream: SimulatedStream | str, event: threading.Event, measured: bool = False) -> None:
        if isinstance(stream, SimulatedStream):
            stream.work.put(event.wait)
            return
        if event.is_set():
            return
        begin = time.perf_counter()
        event.wait()
        if measured:
            self._stalled += time.perf_counter() - begin

    def is_complete(self, event: threading.Event) -> bool:
        return event.is_set()

    def synchronize(self, event: threading.Event) -> None:
        event.wait()

    def stall_seconds(self) -> float:
        return self._stalled

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def free(self, block: Tensor, stream: SimulatedStream | str) -> None:
        pass

    def copy(self, stream: SimulatedStream, target: Tensor, source: Tensor) -> None:
        nbytes = source.numel()
        least = self.latency + (nbytes / self.bandwidth if self.bandwidth else 0.0)

        def run() -> None:
            begin = time.perf_counter()
            # One thread, and without the interpreter's lock.
            ctypes.memmove(target.data_ptr(), source.data_ptr(), nbytes)
            rest = least - (time.perf_counter() - begin)
            if rest > 0:
                time.sleep(rest)

        stream.work.put(run)

    def pack(self, parts: Sequence[Tensor], offsets: Sequence[int], block: Tensor) -> None:
        _pack(list(parts), list(offsets), [0] * len(parts), block)

    def allocate_host(self, nbytes: int) -> Tensor:
        if self._host_left is not None:
            if nbytes > self._host_left:
                raise MemoryError(f"no memory for {nbytes} bytes on the host, which has {self._host_left}")
            self._host_left -= nbytes
        return map_pages(nbytes)

    def free_host(self, memory: Tensor) -> None:
        if self._host_left is not None:
            self._host_left += memory.numel()

    def touch_host(self, memory: Tensor, writes: bool) -> None:
        pass

    def forget_host(self, memory: Tensor) -> None:
        pass


__all__ = ["SimulatedDevice", "SimulatedStream"]
