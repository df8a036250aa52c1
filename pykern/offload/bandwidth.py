"""How fast copies are, measured: what a plan is to be made with."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_device import CudaDevice
from .engine import Engine, stored
from .streams import Stream, StreamDevice

SIZES = (1 << 16, 1 << 20, 1 << 24, 1 << 28)

_ROUNDS = 3
# A round repeats small copies until they take that long, in seconds.
_LEAST = 2e-3


class Bandwidth(NamedTuple):
    """Bytes per second of copies of one size; `memory` is where they go.

    out, back: one direction alone. out_beside_back, back_beside_out: both at once, for as long as the slower takes.
    """

    memory: str
    nbytes: int
    out: float
    back: float
    out_beside_back: float
    back_beside_out: float

    @property
    def directions(self) -> int:
        """2 if a block goes out and another comes back sooner when both run at once, by a tenth at least; else 1."""
        in_turns = 1 / self.out + 1 / self.back
        at_once = max(1 / self.out_beside_back, 1 / self.back_beside_out)
        return 2 if at_once < 0.9 * in_turns else 1

    @property
    def rates(self) -> tuple[float, float]:
        """Out and back, as the better of the two ways has them: a plan's `bandwidth`."""
        return (self.out, self.back) if self.directions == 1 else (self.out_beside_back, self.back_beside_out)


def measure_bandwidth(
    device: torch.device | str | StreamDevice = "cpu",
    sizes: Sequence[int] = SIZES,
    *,
    path: str | os.PathLike | None = None,
) -> list[Bandwidth]:
    """Copies blocks of some sizes out of the device's memory and back, and tells how fast that was: medians.

        best = measure_bandwidth("cuda", [block_bytes])[0]
        plan = pykern.plan(..., bandwidth=best.rates)

    On "cuda": to and from "registered" memory, as the arena of pinned memory is; "pinned", torch's own; and
    "pageable". On any other StreamDevice: to and from "host" memory as it gives it. On "cpu": the engine of CPU
    tensors, to and from its arena, "memory".

    sizes: bytes of a block. path: a folder; there the engine of CPU tensors also measures a "file".

    Raises:
        TypeError, ValueError: sizes are not positive integers.
        MemoryError, OSError: there is no room for two blocks.
    """
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"sizes: expected integers, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"sizes: expected at least 1 byte, got {size}")
    if not sizes:
        return []
    measured = []
    if hasattr(device, "compute_stream"):
        measured += _of_streams("host", device, device.allocate_host, device.free_host, sizes)
    elif torch.device(device).type == "cpu":
        measured += _of_engine("memory", None, sizes)
    else:
        device = CudaDevice(device)
        measured += _of_streams("registered", device, device.allocate_host, device.free_host, sizes)
        for name, pinned in (("pinned", True), ("pageable", False)):
            measured += _of_streams(name, device, _torch_memory(pinned), lambda memory: None, sizes)
    if path is not None:
        measured += _of_engine("file", os.fspath(path), sizes)
    return measured


def _torch_memory(pinned: bool) -> Callable[[int], Tensor]:
    return lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def _of_streams(
    name: str,
    device: StreamDevice,
    allocate_host: Callable[[int], Tensor],
    free_host: Callable[[Tensor], None],
    sizes: Sequence[int],
) -> list[Bandwidth]:
    largest = max(sizes)
    hosts, measured = [], []
    try:
        for _ in range(2):
            hosts.append(allocate_host(largest))
        blocks = [device.allocate(largest) for _ in range(2)]
        allocated = device.record(device.compute_stream())
        for stream in (device.out_stream, device.back_stream):
            device.wait(stream, allocated)
        for size in sizes:
            out = (device.out_stream, hosts[0][:size], blocks[0][:size])
            back = (device.back_stream, blocks[1][:size], hosts[1][:size])
            seconds = [_seconds_of_copies(device, copies) for copies in ([out], [back], [out, back])]
            measured.append(_bandwidth(name, size, *seconds))
        for block in blocks:
            device.free(block, device.compute_stream())
    finally:
        for stream in (device.out_stream, device.back_stream):
            device.synchronize(device.record(stream))
        for host in hosts:
            free_host(host)
    return measured


def _seconds_of_copies(device: StreamDevice, copies: Sequence[tuple[Stream, Tensor, Tensor]]) -> list[float]:
    """Of each copy, when all are under way; of the repetitions as many as fill the least time."""

    def run(times: int) -> list[float]:
        begin = time.perf_counter()
        for _ in range(times):
            for stream, target, source in copies:
                device.copy(stream, target, source)
        ends = [device.record(stream) for stream, _, _ in copies]
        seconds = []
        for end in ends:
            device.synchronize(end)
            seconds.append((time.perf_counter() - begin) / times)
        return seconds

    times = max(1, round(_LEAST / max(min(run(1)[-1], run(1)[-1]), 1e-6)))
    rounds = [run(times) for _ in range(_ROUNDS)]
    return [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def _of_engine(name: str, folder: str | None, sizes: Sequence[int]) -> list[Bandwidth]:
    measured = []
    for size in sizes:
        engine = Engine(folder, queue_bytes=4 * size)
        rates = engine.measure(size, rounds=_ROUNDS)
        both = _seconds_of_both(engine, size)
        measured.append(_bandwidth(name, size, [size / rates.out], [size / rates.back], both))
        engine.close()
    return measured


def _seconds_of_both(engine: Engine, size: int) -> list[float]:
    """Of a block that goes out while another comes back."""
    going, coming = (torch.full((size,), value, dtype=torch.uint8, device="cpu") for value in (1, 2))
    item = stored(engine, coming)
    rounds = []
    for _ in range(1 + _ROUNDS):
        begin = time.perf_counter()
        engine.reserve(item)
        other = stored(engine, going)
        gone = time.perf_counter()
        engine.load(item)
        rounds.append((gone - begin, time.perf_counter() - begin))
        engine.unreserve(item)
        engine.release(other)
    engine.release(item)
    return [statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True)]


def _bandwidth(name: str, size: int, out: list[float], back: list[float], both: list[float]) -> Bandwidth:
    return Bandwidth(name, size, *(size / max(seconds, 1e-9) for seconds in (*out, *back, *both)))


__all__ = ["Bandwidth", "measure_bandwidth"]
