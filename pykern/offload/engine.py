"""The native engine's ops, and the lifetime of one engine."""

import os
import shutil
import statistics
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import _native  # noqa: F401  (registers the ops)

_open = torch.ops.pykern.offload_open.default
_error = torch.ops.pykern.offload_error.default
_close = torch.ops.pykern.offload_close.default
_store = torch.ops.pykern.offload_store.default
_settle = torch.ops.pykern.offload_settle.default
_reserve = torch.ops.pykern.offload_reserve.default
_unreserve = torch.ops.pykern.offload_unreserve.default
_load = torch.ops.pykern.offload_load.default
_release = torch.ops.pykern.offload_release.default
_map_allocations = torch.ops.pykern.offload_map_allocations.default
_synchronize = torch.ops.pykern.offload_synchronize.default
_take_failure = torch.ops.pykern.offload_take_failure.default
_description = torch.ops.pykern.offload_description.default
_counters = torch.ops.pykern.offload_counters.default
_reset_counters = torch.ops.pykern.offload_reset_counters.default

# The order of Engine::counters in csrc/offload/engine.h.
_COUNTERS = (
    "stall_seconds", "queue_seconds", "offloads", "offloaded_bytes", "reloads", "reloaded_bytes", "forwards",
    "forwarded_bytes", "slots", "peak_slots", "slot_bytes", "peak_slot_bytes", "extent_bytes",
    "growths", "buffer_allocations", "spills", "spilled_bytes", "file_bytes",
    "planned_slot_bytes", "planned_block_bytes",
)  # fmt: skip

# By how much the storage grows when it is full and has no fixed capacity. A file starts at that size.
ARENA_GROWTH = 64 << 20
FILE_GROWTH = 256 << 20

_PAGE = 4096


def whole_pages(nbytes: int) -> int:
    """What a slot of `nbytes` takes in a file, or in memory that may go to one."""
    return -(-nbytes // _PAGE) * _PAGE


def return_freed_memory(threshold: int) -> bool:
    """Makes the C library map allocations of `threshold` bytes or more, so that they leave the process when freed.

    Process-wide. False, and nothing happens, where the library can't, or where the environment decides it.
    """
    return "MALLOC_MMAP_THRESHOLD_" not in os.environ and _map_allocations(threshold)


class Link(NamedTuple):
    """A link to model: a copy takes at least latency + bytes / bandwidth, and waits for the one before it."""

    out: float | None = None
    """Bytes per second; None: as fast as it goes."""
    back: float | None = None
    latency: float = 0.0
    """Seconds."""
    directions: Literal[1, 2] = 2
    """1: copies out and back wait for each other. 2: only those in the same direction do."""


class Rates(NamedTuple):
    """Bytes per second."""

    out: float
    back: float


def spill_folder(path: str | os.PathLike | None) -> str:
    """The folder of a spill file: `path`, which must exist, or the system's temporary folder."""
    folder = os.fspath(path) if path is not None else tempfile.gettempdir()
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"path: expected an existing folder, got {folder!r}; create it or pass another")
    return folder


def warn_if_in_memory(owner: str, engine: "Engine", folder: str | None, stacklevel: int) -> None:
    if engine.description.endswith("file, in memory"):
        warnings.warn(
            f"{owner}: {folder} lies in memory (tmpfs), so nothing is saved by spilling there; "
            "pass path= a folder on a disk",
            stacklevel=stacklevel + 1,
        )


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Engine:
    """A C++ engine: one or two media, their slots, and the threads that copy.

    Closed when the last reference goes; whoever holds an item of it holds the engine. A forked process can use neither.

    Args:
        folder: where the spill file lies; None: no file, only an arena of memory.
        capacity: bytes of the arena, or of the file if there is one; None: it grows as needed.
        threads: threads that copy.
        queue_bytes: bytes of blocks whose writing has not ended, at most (or one larger block).
        delay_seed: for hunting: copies are delayed and a file's transfers cut short at random by this seed, freed bytes
            and those between the parts of a block are poisoned, and a block that is not what was stored is an error.
        memory: with a folder: bytes of an arena in front of the file; None or 0: none. Blocks go there while there is
            room, and above seven eighths the oldest without a slot are spilled to the file in the background.
        slots: sizes of planned slots, for `store(slot=n)`. They lie in the memory, or in the file without memory.
        buffer_bytes: bytes of buffers that are kept for the next loads; by default two of the largest slot, and at
            least queue_bytes. A steady state allocates nothing if it never needs more at once.
        link: a link that this machine does not have, between tensors and media.
        transfers: "best", io_uring where the system allows it; or "threads", this engine's own with pread and pwrite.

    Raises:
        MemoryError, OSError: the arena or the file can't be made that large.
        RuntimeError: the system gives no more threads.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        capacity: int | None = None,
        threads: int = 2,
        queue_bytes: int = 32 << 20,
        delay_seed: int | None = None,
        memory: int | None = None,
        slots: Sequence[int] = (),
        buffer_bytes: int | None = None,
        link: Link | None = None,
        transfers: Literal["best", "threads"] = "best",
    ) -> None:
        memory = memory or None
        if folder is None:
            memory = capacity or machine_memory()
            file = []
        else:
            limit = -1 if capacity is None else whole_pages(capacity)
            file = [limit, capacity or FILE_GROWTH, FILE_GROWTH, int(transfers == "best")]
        self.tiers: tuple[str, ...] = ("host",) * (memory is not None) + ("file",) * (folder is not None)
        if buffer_bytes is None:
            buffer_bytes = max(queue_bytes, 2 * whole_pages(max(slots, default=0)))
        self.handle = _open(
            [] if memory is None else [memory, ARENA_GROWTH], folder or "", file, list(slots), threads, queue_bytes,
            buffer_bytes, [] if link is None else [link.out or 0.0, link.back or 0.0, link.latency, link.directions],
            -1 if delay_seed is None else delay_seed,
        )  # fmt: skip
        self._closing = weakref.finalize(self, _close, self.handle)
        error = _error(self.handle)
        if error:
            self.close()
            if folder is None:
                raise MemoryError(f"capacity: {error}; pass a smaller capacity, or fewer slots")
            raise OSError(
                f"path: {error} ({shutil.disk_usage(folder).free} bytes are free in {folder}); "
                "pass path= a folder with more room, or a smaller capacity="
            )
        self.description: str = _description(self.handle)

    def close(self) -> None:
        self._closing()

    def store(
        self,
        parts: list[Tensor],
        offsets: list[int],
        nbytes: int,
        *,
        slot: int = -1,
        tier: Literal["host", "file"] | None = None,
    ) -> int:
        """Starts writing a block of `nbytes` that consists of 1-D uint8 tensors, each at its offset.

        The parts are copied from where they lie, and held until the block is written or released. From multiples of
        4096 in the block, and of 64 in memory, they go to a file without being copied on the way, where the disk can.
        Returns the item's number, or -1 if there is no room, or writing has failed: the caller keeps the parts.

        slot: the planned slot to use. If its last item is being read back, this waits for the end of that.
        tier: where to store it; by default in the first tier with room.

        Raises:
            ValueError: this engine has no such tier.
            RuntimeError: parts that don't fit; or, with `slot`, against the plan: there is no such slot, the block is
                larger, or the slot's last item has been neither reserved nor released.
        """
        if tier is not None and tier not in self.tiers:
            raise ValueError(
                f"tier: expected {' or '.join(map(repr, self.tiers))}, got {tier!r}; open it with a folder"
            )
        return _store(self.handle, parts, offsets, nbytes, slot, -1 if tier is None else self.tiers.index(tier))

    def settle(self, item: int) -> bool:
        """Waits until the item is written, and drops its parts.

        False if the write failed: the item then keeps its parts, and loads are answered from them.
        """
        return _settle(self.handle, item)

    def reserve(self, item: int) -> None:
        """Starts reading the item and keeps what was read until `unreserve`."""
        _reserve(self.handle, item)

    def unreserve(self, item: int) -> None:
        _unreserve(self.handle, item)

    def load(self, item: int) -> Tensor:
        """The block's bytes, uint8 [nbytes]; waits for them if need be. What lies between the parts is undefined."""
        return _load(self.handle, item)

    def release(self, item: int) -> None:
        _release(self.handle, item)

    def synchronize(self) -> None:
        _synchronize(self.handle)

    def take_failure(self) -> str:
        """Why writing or growing failed since the last call, or an empty string."""
        return _take_failure(self.handle)

    def counters(self) -> dict[str, float]:
        """Since the start or `reset_counters`, except for what is in use now and for growths and allocations, which
        count from the start. `waste`: the part of the planned slots' bytes that their blocks did not need."""
        values = dict(zip(_COUNTERS, _counters(self.handle), strict=True))
        counters = {name: value if name.endswith("seconds") else int(value) for name, value in values.items()}
        planned, used = counters.pop("planned_slot_bytes"), counters.pop("planned_block_bytes")
        return {**counters, "waste": 1 - used / planned if planned else 0.0}

    def reset_counters(self) -> None:
        _reset_counters(self.handle)

    def measure(
        self, nbytes: int, *, rounds: int = 3, slot: int = -1, tier: Literal["host", "file"] | None = None
    ) -> Rates:
        """Bytes per second of one block of `nbytes` at a time, out and back: the medians of some rounds.

        A block's way out ends when its parts are free, its way back when it can be used. A first round, which may have
        to make the storage grow, does not count; in a planned slot that is free, nothing grows.

        Raises:
            MemoryError: there is no room for one block.
        """
        block = torch.full((nbytes,), 1, dtype=torch.uint8, device="cpu")
        return measured_rates(self, block, time.perf_counter, rounds, slot=slot, tier=tier)


def measured_rates(
    engine: "Engine", block: Tensor, now: Callable[[], float], rounds: int = 3, **place: object
) -> Rates:
    """As Engine.measure, of `block`; `now` tells the seconds when what was asked for so far is done."""
    nbytes, seconds = block.numel(), []
    for _ in range(rounds + 1):
        begin = now()
        item = stored(engine, block, **place)
        gone = now()
        engine.load(item)
        seconds.append((gone - begin, now() - gone))
        engine.release(item)
    out, back = zip(*seconds[1:], strict=True)
    return Rates(nbytes / statistics.median(out), nbytes / statistics.median(back))


def stored(engine: "Engine", block: Tensor, **place: object) -> int:
    """The item of a block to measure with, once it is written. MemoryError if there is no room for it."""
    item = engine.store([block], [0], block.numel(), **place)
    if item < 0 or not engine.settle(item):
        engine.release(item)
        reason = engine.take_failure() or "the storage is full"
        raise MemoryError(f"nbytes: no room to measure with {block.numel()} bytes: {reason}; pass fewer")
    return item
