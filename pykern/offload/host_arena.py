"""Slots for offloaded blocks in the host's memory."""

import bisect
import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from .streams import Point, Stream, StreamDevice

Ends = dict[Stream, Point]
"""The last copy of each stream."""

ALIGNMENT = 4096
"""Slots begin at multiples of this, so that they can go to a file as they are."""

GROWTH = 64 << 20
"""By how much an arena without a plan grows at least; later, by an eighth of what it has."""


class Slot:
    """A range of the arena that one item owns. A new owner, a new slot: the generation is never given twice.

    ends: what a copy into the slot has to wait for, since copies of an earlier owner may still run.
    """

    __slots__ = ("ends", "generation", "index", "memory", "owner")

    def __init__(self, index: int, memory: Tensor, ends: Ends) -> None:
        self.index = index
        self.memory = memory
        self.ends = ends
        self.generation = -1
        self.owner: object = None


class _Free:
    """Bytes of one allocation that nobody owns, and the copies that may still run on them."""

    __slots__ = ("allocation", "begin", "end", "ends")

    def __init__(self, allocation: int, begin: int, end: int, ends: Ends) -> None:
        self.allocation, self.begin, self.end, self.ends = allocation, begin, end, ends

    def place(self) -> tuple[int, int]:
        return self.allocation, self.begin


class HostArena:
    """Memory for slots: one allocation that a plan has sized, or allocations that are added while they don't suffice.

    slot_bytes: the slots of the plan; they take their sizes, each rounded up to a page, and nothing is allocated later.
    capacity: without a plan, the most bytes to allocate. growth: at least so many at a time.
    """

    def __init__(
        self,
        device: StreamDevice,
        slot_bytes: Sequence[int] | None = None,
        capacity: int | None = None,
        growth: int = GROWTH,
    ) -> None:
        self._device = device
        self._capacity, self._growth = capacity, growth
        self._allocations: list[Tensor] = []
        self._free: list[_Free] = []
        self._planned: list[Slot | None] = []
        self._generation = 0
        self.extent = 0
        self.slots = self.peak_slots = 0
        self.bytes = self.peak_bytes = self.growths = 0
        self.is_planned = slot_bytes is not None
        if slot_bytes is not None:
            self._plan(slot_bytes)

    def _plan(self, slot_bytes: Sequence[int]) -> None:
        sizes = [_round_up(size) for size in slot_bytes]
        self._allocate(sum(sizes))
        begin = 0
        for index, size in enumerate(sizes):
            memory = self._allocations[0][begin : begin + size] if size else None
            self._planned.append(Slot(index, memory, {}) if size else None)
            begin += size

    def _allocate(self, nbytes: int) -> None:
        if nbytes:
            self._allocations.append(self._device.allocate_host(nbytes))
            self.extent += nbytes

    def acquire(self, nbytes: int, index: int = -1) -> Slot | None:
        """A free slot of at least `nbytes`; slot `index` of the plan, if that is not negative. None if there is none.

        MemoryError if the arena may grow, but the memory can't be had. RuntimeError if the plan has no such slot.
        """
        planned = self.is_planned or index >= 0
        slot = self._acquire_planned(nbytes, index) if planned else self._acquire_range(nbytes)
        if slot is not None:
            self._generation += 1
            slot.generation = self._generation
            self.slots += 1
            self.bytes += slot.memory.numel()
            self.peak_slots = max(self.peak_slots, self.slots)
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return slot

    def planned(self, index: int) -> Slot | None:
        """The slot of the plan as it is now, whoever owns it."""
        if not 0 <= index < len(self._planned):
            raise RuntimeError(f"slot: expected one of the plan's {len(self._planned)} slots, got {index}")
        return self._planned[index]

    def _acquire_planned(self, nbytes: int, index: int) -> Slot | None:
        if index < 0:
            fitting = [slot for slot in self._planned if _fits(slot, nbytes) and slot.owner is None]
            slot = min(fitting, key=lambda slot: (slot.memory.numel(), slot.index), default=None)
        else:
            slot = self.planned(index)
            if not _fits(slot, nbytes):
                size = 0 if slot is None else slot.memory.numel()
                raise RuntimeError(f"slot: expected one with room for {nbytes} bytes, slot {index} has {size}")
            if slot.owner is not None:
                return None
        if slot is None:
            return None
        fresh = Slot(slot.index, slot.memory, slot.ends)
        self._planned[slot.index] = fresh
        return fresh

    def _acquire_range(self, nbytes: int) -> Slot | None:
        size = _round_up(nbytes)
        best = min((free for free in self._free if free.end - free.begin >= size), key=_size_and_place, default=None)
        if best is None:
            growth = max(size, self._growth, _round_up(self.extent // 8))
            if self._capacity is not None:
                growth = min(growth, self._capacity - self.extent)
            if growth < size:
                return None
            self._allocate(growth)
            self.growths += 1
            best = _Free(len(self._allocations) - 1, 0, growth, {})
            self._insert(best)
        memory = self._allocations[best.allocation][best.begin : best.begin + size]
        slot = Slot(best.allocation, memory, dict(best.ends))
        best.begin += size
        if best.begin == best.end:
            self._free.remove(best)
        return slot

    def give(self, slot: Slot, ends: Ends) -> None:
        """The slot is free for copies that wait for `ends`."""
        slot.generation = -1
        slot.owner = None
        self.slots -= 1
        self.bytes -= slot.memory.numel()
        self._device.forget_host(slot.memory)
        if self.is_planned:
            self._planned[slot.index] = Slot(slot.index, slot.memory, ends)
            return
        begin = slot.memory.storage_offset() - self._allocations[slot.index].storage_offset()
        self._insert(_Free(slot.index, begin, begin + slot.memory.numel(), ends))

    def _insert(self, free: _Free) -> None:
        at = bisect.bisect_left(self._free, free.place(), key=_Free.place)
        after = self._free[at] if at < len(self._free) else None
        before = self._free[at - 1] if at > 0 else None
        if after is not None and after.allocation == free.allocation and free.end == after.begin:
            free = _Free(free.allocation, free.begin, after.end, later_ends(free.ends, after.ends))
            self._free.pop(at)
        if before is not None and before.allocation == free.allocation and before.end == free.begin:
            free = _Free(free.allocation, before.begin, free.end, later_ends(before.ends, free.ends))
            at -= 1
            self._free.pop(at)
        self._free.insert(at, free)

    def stop_growing(self) -> None:
        self._capacity = self.extent

    def reset_peaks(self) -> None:
        self.peak_slots, self.peak_bytes = self.slots, self.bytes

    def close(self) -> None:
        """Gives the memory back; no copy is under way."""
        self._free, self._planned = [], []
        for memory in self._allocations:
            self._device.free_host(memory)
        self._allocations = []
        self.extent = 0


def map_pages(nbytes: int) -> Tensor:
    """uint8 [nbytes] of fresh memory that begins at a page, in huge pages where the system has them. MemoryError.

    Forked processes, such as those that load data, do not have it.
    """
    try:
        # Not shared, as it would be by default: shared memory hardly ever gets huge pages.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {nbytes} bytes on the host: {error}") from error
    # A kernel without huge pages refuses, which is no harm. Pinned pages are copied when a process forks.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(AttributeError, OSError):
            pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=torch.uint8)


def later_ends(one: Ends, other: Ends) -> Ends:
    """What waits for these has waited for both: in one stream, the later point is after the earlier."""
    return one | {
        stream: point for stream, point in other.items() if stream not in one or one[stream].number < point.number
    }


def _round_up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _fits(slot: Slot | None, nbytes: int) -> bool:
    return slot is not None and slot.memory.numel() >= nbytes


def _size_and_place(free: _Free) -> tuple[int, int, int]:
    return free.end - free.begin, free.allocation, free.begin
