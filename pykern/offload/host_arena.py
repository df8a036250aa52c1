"""Slots for offloaded blocks in the host's memory."""

import bisect
import contextlib
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .engine import whole_pages
from .streams import Point, Stream, StreamDevice

Ends = dict[Stream, Point]
"""The last copy of each stream."""

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


class HostArena(ABC):
    """Memory of the host in which slots lie, and how much of it is in use.

    A PlannedArena has the slots of a plan, a GrowingArena makes them as large as they are asked for.
    """

    def __init__(self, device: StreamDevice) -> None:
        self._device = device
        self._allocations: list[Tensor] = []
        self._planned: list[Slot] = []
        self._generation = 0
        self.slots = self.peak_slots = self.bytes = self.peak_bytes = self.extent = self.growths = 0

    def acquire(self, nbytes: int, index: int = -1) -> Slot | None:
        """A free slot of at least `nbytes`; slot `index` of the plan, if that is not negative. None if there is none.

        MemoryError if the arena may grow, but the memory can't be had. RuntimeError if the plan has no such slot.
        """
        slot = self._take(nbytes) if index < 0 else self._take_planned(nbytes, index)
        if slot is not None:
            self._generation += 1
            slot.generation = self._generation
            self.slots += 1
            self.bytes += slot.memory.numel()
            self.peak_slots = max(self.peak_slots, self.slots)
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return slot

    def planned(self, index: int) -> Slot:
        """The slot of the plan as it is now, whoever owns it."""
        if not 0 <= index < len(self._planned):
            raise RuntimeError(f"slot: expected one of the plan's {len(self._planned)} slots, got {index}")
        return self._planned[index]

    @abstractmethod
    def serves(self, slot: Slot, nbytes: int) -> bool:
        """Whether giving this slot back helps to make room for `nbytes`."""

    def give(self, slot: Slot, ends: Ends) -> None:
        """The slot is free for copies that wait for `ends`."""
        slot.generation = -1
        slot.owner = None
        self.slots -= 1
        self.bytes -= slot.memory.numel()
        self._device.forget_host(slot.memory)
        self._take_back(slot, ends)

    @abstractmethod
    def _take(self, nbytes: int) -> Slot | None:
        """A free slot of at least `nbytes`."""

    @abstractmethod
    def _take_back(self, slot: Slot, ends: Ends) -> None:
        """What was given is free."""

    def _take_planned(self, nbytes: int, index: int) -> Slot | None:
        slot = self.planned(index)
        size = slot.memory.numel()
        if size < nbytes:
            raise RuntimeError(f"slot: expected one with room for {nbytes} bytes, slot {index} has {size}")
        return self._renew(slot, slot.ends) if slot.owner is None else None

    def _renew(self, slot: Slot, ends: Ends) -> Slot:
        fresh = self._planned[slot.index] = Slot(slot.index, slot.memory, ends)
        return fresh

    def _allocate(self, nbytes: int) -> Tensor:
        memory = self._device.allocate_host(nbytes)
        self._allocations.append(memory)
        self.extent += nbytes
        return memory

    def reset_peaks(self) -> None:
        self.peak_slots, self.peak_bytes = self.slots, self.bytes

    def close(self) -> None:
        """Gives the memory back; no copy is under way."""
        self._planned = []
        for memory in self._allocations:
            self._device.free_host(memory)
        self._allocations = []
        self.extent = 0


class PlannedArena(HostArena):
    """One allocation, cut into the slots of a plan, each rounded up to a page. Nothing is allocated later."""

    def __init__(self, device: StreamDevice, slot_bytes: Sequence[int]) -> None:
        super().__init__(device)
        sizes = [whole_pages(size) for size in slot_bytes]
        memory = self._allocate(sum(sizes)) if any(sizes) else torch.empty(0, dtype=torch.uint8, device="cpu")
        self._planned = [Slot(index, part, {}) for index, part in enumerate(memory.split(sizes))]

    def serves(self, slot: Slot, nbytes: int) -> bool:
        return slot.memory.numel() >= nbytes

    def _take(self, nbytes: int) -> Slot | None:
        fitting = [slot for slot in self._planned if slot.owner is None and self.serves(slot, nbytes)]
        smallest = min(fitting, key=lambda slot: (slot.memory.numel(), slot.index), default=None)
        return None if smallest is None else self._renew(smallest, smallest.ends)

    def _take_back(self, slot: Slot, ends: Ends) -> None:
        self._renew(slot, ends)


class _Free:
    """Bytes of one allocation that nobody owns, and the copies that may still run on them."""

    __slots__ = ("allocation", "begin", "end", "ends")

    def __init__(self, allocation: int, begin: int, end: int, ends: Ends) -> None:
        self.allocation, self.begin, self.end, self.ends = allocation, begin, end, ends

    def place(self) -> tuple[int, int]:
        return self.allocation, self.begin

    def size_and_place(self) -> tuple[int, int, int]:
        return self.end - self.begin, self.allocation, self.begin


class GrowingArena(HostArena):
    """Allocations that are added while they don't suffice. Slots are ranges of them, the smallest that serve.

    capacity: the most bytes to allocate; None: as many as there are. growth: at least so many at a time.
    """

    def __init__(self, device: StreamDevice, capacity: int | None = None, growth: int = GROWTH) -> None:
        super().__init__(device)
        self._capacity, self._growth = capacity, growth
        self._free: list[_Free] = []

    def serves(self, slot: Slot, nbytes: int) -> bool:
        return True

    def _take(self, nbytes: int) -> Slot | None:
        size = whole_pages(nbytes)
        fitting = [free for free in self._free if free.end - free.begin >= size]
        best = min(fitting, key=_Free.size_and_place) if fitting else self._grow(size)
        if best is None:
            return None
        memory = self._allocations[best.allocation][best.begin : best.begin + size]
        best.begin += size
        if best.begin == best.end:
            self._free.remove(best)
        return Slot(best.allocation, memory, dict(best.ends))

    def _grow(self, size: int) -> _Free | None:
        growth = max(size, self._growth, whole_pages(self.extent // 8))
        if self._capacity is not None:
            growth = min(growth, self._capacity - self.extent)
        if growth < size:
            return None
        try:
            self._allocate(growth)
        except MemoryError:
            self._capacity = self.extent
            raise
        self.growths += 1
        free = _Free(len(self._allocations) - 1, 0, growth, {})
        self._insert(free)
        return free

    def _take_back(self, slot: Slot, ends: Ends) -> None:
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
