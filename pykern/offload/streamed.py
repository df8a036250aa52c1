"""The engine for devices with streams: blocks go to slots of the host's memory and back, in order by events alone."""

import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from .engine import Engine
from .host_arena import GROWTH, GrowingArena, HostArena, PlannedArena, Slot, later_ends
from .ordering import Ordering
from .staging import aligned
from .streamed_items import Item, check_parts, runs_of
from .streams import StreamDevice

PACKED_BELOW = 1 << 20
"""Bytes that a copy moves in the time in which it starts, about; larger parts are not worth a copy on the device."""

_COUNTED = (
    "offloads", "offloaded_bytes", "reloads", "reloaded_bytes", "forwards", "forwarded_bytes", "spills",
    "spilled_bytes",
)  # fmt: skip

_SPILLED_AHEAD = 4
"""Items that are written to the file when one must give up its slot."""


class StreamedEngine:
    """Moves blocks of many parts between a device and the host, and never lets the device or the host wait for more
    than the copy that is needed.

    - A copy out waits for the work that made its parts, and for the copies that still use its slot.
    - Parts are let go once the stream that made them waits for the copy's end. So what comes into their place is in
      order after it, and when memory is free doesn't depend on timing.
    - A copy back goes into memory allocated in the stream that computes at that moment, and waits for that stream and
      for the copy out. Whoever loads the block has the stream that computes then wait for it.
    - A slot has a new generation for each owner. It is free once the last copy that touches it is known: the next copy
      into it waits for that one, the host does not.

    A failure to move something leaves it where it is. Nothing can be captured in a CUDA graph: its replays would write
    to slots that may have become others' since. A process that is forked off can't use it, and frees nothing.

    slot_bytes: sizes of the slots of a plan; the host's memory is then allocated once, and never grows. Otherwise
    it grows as needed, up to `capacity`.
    queue_bytes: device memory that copies under way may hold, or one larger item; beyond it the computing stream waits
    for the oldest. None: `settle` alone lets parts go.
    packed_below: neighbouring parts smaller than this are packed into one block on the device, and copied at once.
    file: where the oldest items go when there is no slot left.

    Not for use from within itself; calls from many threads are taken one at a time.
    """

    ordering = Ordering

    def __init__(
        self,
        device: StreamDevice,
        *,
        slot_bytes: Sequence[int] | None = None,
        capacity: int | None = None,
        growth: int = GROWTH,
        queue_bytes: int | None = None,
        packed_below: int = PACKED_BELOW,
        file: Engine | None = None,
    ) -> None:
        self._device, self._packed_below = device, packed_below
        self._order = self.ordering(device)
        self._arena: HostArena
        if slot_bytes is None:
            self._arena = GrowingArena(device, capacity, growth)
        else:
            try:
                self._arena = PlannedArena(device, slot_bytes)
            except MemoryError as error:
                asked = f"{sum(slot_bytes)} bytes for {len(slot_bytes)} slots of the plan"
                raise MemoryError(f"slot_bytes: {error} ({asked})") from error
        self._queue_bytes, self._file = queue_bytes, file
        self._items: dict[int, Item] = {}
        self._writing: deque[Item] = deque()
        self._writing_bytes = 0
        self._spilling: deque[Item] = deque()
        self._released: deque[int] = deque()
        # Taken without waiting by `release`, which a garbage collection may call in the midst of anything.
        self._lock = threading.Lock()
        self._next_item = 0
        self._failure = ""
        self.tiers = ("host",) if file is None else ("host", "file")
        self._can_spill = file is not None
        self._stalled_before = 0.0
        self.description = f"pinned memory of {device.name}"
        self._counts: Counter[str] = Counter()
        self._process = os.getpid()
        self._closing = weakref.finalize(self, _close, self._process, device, self._arena, file)

    # --- out ----------------------------------------------------------------------------------------

    def store(
        self,
        parts: Sequence[Tensor],
        offsets: Sequence[int],
        nbytes: int,
        *,
        slot: int = -1,
        tier: Literal["host", "file"] | None = None,
    ) -> int:
        """Starts copying parts out, to `offsets` of a block of `nbytes`; the item's number.

        Returns -1 if there is no room, or copying can't be started: the caller keeps the parts.

        parts: uint8, one dimension, on the device. offsets: ascending multiples of 256.
        slot: of the plan. It may hold the block of an item that is being copied back: that item then keeps its block
            on the device until it is released.
        tier: "file": goes on to the file once it is settled.

        Raises:
            ValueError: this engine has no such tier.
            RuntimeError: `slot` against the plan: there is no such slot, the block is larger, or the slot's last item
                has been neither reserved nor released.
        """
        with self._lock:
            self._begin()
            check_parts(parts, offsets, nbytes)
            if tier is not None and tier not in self.tiers:
                raise ValueError(f"tier: expected {' or '.join(map(repr, self.tiers))}, got {tier!r}; pass file=")
            if nbytes == 0:
                return self._store_nothing()
            place = self._place(nbytes, slot)
            if place is None:
                return -1
            self._next_item += 1
            item = Item(self._next_item, nbytes, place, self._device.compute_stream())
            try:
                self._copy_out(item, parts, offsets)
            except BaseException as error:
                self._give_up_copy_out(item, parts)
                if not isinstance(error, RuntimeError):
                    raise
                self._failure = f"copying out of {self._device.name} failed: {error}"
                return -1
            item.goes_to_file, item.is_planned = tier == "file", place.index == slot
            place.owner = item
            self._items[item.number] = item
            self._writing.append(item)
            self._writing_bytes += nbytes
            self._counts.update(offloads=1, offloaded_bytes=nbytes)
            if slot >= 0:
                self._counts.update(planned_bytes=place.memory.numel(), needed_bytes=nbytes)
            if self._queue_bytes is not None:
                while self._writing_bytes > self._queue_bytes and len(self._writing) > 1:
                    self._settle(self._writing[0])
            return item.number

    def _store_nothing(self) -> int:
        self._next_item += 1
        item = self._items[self._next_item] = Item(self._next_item, 0, None, self._device.compute_stream())
        item.block, item.block_home, item.arrived = self._device.allocate(0), item.home, self._order.point(item.home)
        return item.number

    def settle(self, item: int) -> bool:
        """The parts are let go; the stream that made them waits for the copy's end before it does anything more.

        True: unlike a write to a file, a copy that was started does not fail by itself.
        """
        with self._lock:
            self._begin()
            self._settle(self._find(item))
            return True

    def _copy_out(self, item: Item, parts: Sequence[Tensor], offsets: Sequence[int]) -> None:
        device = self._device
        for begin, size, neighbours in runs_of(parts, offsets, self._packed_below):
            if len(neighbours) == 1:
                item.held.append((begin, neighbours[0][1]))
                continue
            staging = device.allocate(aligned(size))
            item.held.append((begin, staging[:size]))
            device.pack([part for _, part in neighbours], [offset - begin for offset, _ in neighbours], staging)
        item.ready = self._order.point(item.home)
        self._order.copy_out(item)
        memory = self._memory(item)
        for begin, source in item.held:
            device.copy(device.out_stream, memory[begin : begin + source.numel()], source)
        item.written = self._order.point(device.out_stream)
        item.ends = {device.out_stream: item.written}

    def _give_up_copy_out(self, item: Item, parts: Sequence[Tensor]) -> None:
        """Copies that were started may still read the parts, which the caller keeps, and write the slot."""
        item.written = self._order.point(self._device.out_stream)
        self._order.drop_sources(item)
        kept = {id(part) for part in parts}
        for _, source in item.held:
            if id(source) not in kept:
                self._device.free(source, item.home)
        self._arena.give(item.slot, later_ends(item.slot.ends, {item.written.stream: item.written}))

    def _settle(self, item: Item) -> None:
        if item in self._writing:
            self._writing.remove(item)
            self._writing_bytes -= item.nbytes
            if item.block is None:
                self._drop_sources(item)
                if item.goes_to_file:
                    self._spilling.append(item)

    def _drop_sources(self, item: Item) -> None:
        if item.held:
            self._order.drop_sources(item)
        for _, source in item.held:
            self._device.free(source, item.home)
        item.held = []

    # --- back ---------------------------------------------------------------------------------------

    def reserve(self, item: int) -> None:
        """Starts copying back, and keeps the block until `unreserve`.

        What is only in the file is read from there first: the first call starts that, the next one waits for it.
        """
        with self._lock:
            self._begin()
            found = self._find(item)
            found.reservations += 1
            if found.block is None and found.slot is None and not found.fetched:
                self._fetch(found)
            else:
                self._bring_back(found)

    def unreserve(self, item: int) -> None:
        with self._lock:
            self._begin()
            found = self._items.get(item)
            if found is None or found.reservations == 0:
                return
            found.reservations -= 1
            if found.reservations == 0 and (found.slot is not None or found.file_item is not None):
                self._drop_block(found)

    def load(self, item: int) -> Tensor:
        """The item's bytes, uint8 [nbytes], for use in the stream that computes at this moment.

        The same block each time, until the item is released or nobody reserves it any more.
        """
        with self._lock:
            self._begin()
            found = self._find(item)
            self._bring_back(found)
            stream = self._device.compute_stream()
            self._order.use(found, stream)
            found.users[stream] = None
            return found.block

    def _bring_back(self, item: Item) -> None:
        if item.block is not None:
            return
        if item.held:
            self._forward(item)
            return
        device = self._device
        if item.slot is None:
            self._read_file(item)
        source = item.landing if item.slot is None else self._memory(item)[: item.nbytes]
        block = device.allocate(item.nbytes)
        item.block, item.block_home = block, device.compute_stream()
        try:
            self._order.copy_in(item, self._order.point(item.block_home))
            device.copy(device.back_stream, block, source)
        except BaseException as error:
            item.arrived = self._order.point(device.back_stream)
            self._drop_block(item)
            if isinstance(error, RuntimeError):
                message = f"ActivationOffload: copying back to {device.name} failed: {error}; the bytes are not lost"
                raise RuntimeError(message) from error
            raise
        item.arrived = self._order.point(device.back_stream)
        item.ends = later_ends(item.ends, {device.back_stream: item.arrived})
        self._counts.update(reloads=1, reloaded_bytes=item.nbytes)

    def _forward(self, item: Item) -> None:
        """What has not gone yet serves as the block, or is put together on the device."""
        device = self._device
        begin, source = item.held[0]
        if len(item.held) == 1 and source.numel() == item.nbytes:
            item.block, item.block_home, item.arrived = source, item.home, item.ready
        else:
            compute = device.compute_stream()
            device.wait(compute, item.ready.event)
            block = device.allocate(aligned(item.nbytes))
            device.pack([source for _, source in item.held], [begin for begin, _ in item.held], block)
            item.block, item.block_home, item.arrived = block[: item.nbytes], compute, self._order.point(compute)
            if compute != item.home:
                # The sources return there, once they are also read.
                device.wait(item.home, item.arrived.event)
        self._counts.update(forwards=1, forwarded_bytes=item.nbytes)

    def _drop_block(self, item: Item) -> None:
        """The block's memory returns to the stream it came from, after the copy into it and all that used it."""
        if item.block is None:
            return
        self._order.drop_block(item)
        if item.landing is not None:
            self._device.synchronize(item.arrived.event)
        # A forwarded source is let go as a source: after it was copied out, too.
        if not item.held or item.block is not item.held[0][1]:
            self._device.free(item.block, item.block_home)
        item.block = item.block_home = item.arrived = item.landing = None
        item.users = {}
        if item.held and item not in self._writing:
            self._drop_sources(item)

    def release(self, item: int) -> None:
        """The item is not needed any more. May be called from anywhere, also from a garbage collection."""
        self._released.append(item)
        if self._lock.acquire(blocking=False):
            try:
                self._forget_released()
            finally:
                self._lock.release()

    def _forget_released(self) -> None:
        if os.getpid() != self._process or self._device.is_capturing():
            return
        while self._released:
            item = self._items.pop(self._released.popleft(), None)
            if item is None:
                continue
            self._drop_block(item)
            self._settle(item)
            if item.slot is not None:
                self._give_slot(item)
            if item.file_item is not None:
                self._release_in_file(item)

    # --- slots --------------------------------------------------------------------------------------

    def _place(self, nbytes: int, index: int) -> Slot | None:
        try:
            slot = self._arena.acquire(nbytes, index)
            while slot is None and self._make_room(nbytes, index):
                slot = self._arena.acquire(nbytes, index)
            if slot is None and index >= 0:
                return self._place(nbytes, -1)
        except MemoryError as error:
            self._failure = str(error)
            return None
        return slot

    def _make_room(self, nbytes: int, index: int) -> bool:
        """Takes the slot of an item that has its bytes elsewhere, or can have; False if there is none."""
        if index >= 0:
            owner = self._arena.planned(index).owner
            # The file may still be reading the slot, so it comes first.
            if owner.file_item is not None and self._evict(owner):
                return True
            if owner.block is not None:
                self._give_slot(owner)
                return True
            if owner.goes_to_file and self._spill(owner):
                return self._evict(owner)
            if not owner.is_planned:
                # It found the slot free, and nobody told that it would stay.
                return False
            raise RuntimeError(
                f"slot: the plan's slot {index} still holds item {owner.number}, which has been neither reserved nor "
                "released; follow the plan's order"
            )
        away = [item for item in self._items.values() if item.slot is not None and item.block is None]
        victims = [item for item in away if self._arena.serves(item.slot, nbytes)]
        # The oldest are needed last. Those after the first are written meanwhile.
        spilling = [item for item in victims[:_SPILLED_AHEAD] if self._spill(item)]
        return bool(spilling) and self._evict(spilling[0])

    def _give_slot(self, item: Item) -> None:
        self._check_generation(item)
        slot, item.slot = item.slot, None
        self._arena.give(slot, item.ends)

    def _memory(self, item: Item) -> Tensor:
        self._check_generation(item)
        return item.slot.memory

    def _check_generation(self, item: Item) -> None:
        if item.slot.generation != item.generation:
            raise RuntimeError(
                f"ActivationOffload: the slot of item {item.number} was given away: it is of generation "
                f"{item.slot.generation}, the item of {item.generation}"
            )

    # --- file ---------------------------------------------------------------------------------------

    def spill(self, item: int) -> bool:
        """Writes the item from its slot to the file, once it is there; the slot is another's from when it is needed.

        False if that can't be. Nobody waits: what is not in its slot yet is looked after in the calls that follow.
        """
        with self._lock:
            self._begin()
            found = self._find(item)
            if found.file_item is None and found.slot is not None and self._can_spill:
                found.goes_to_file = True
                self._spilling.append(found)
                self._spill_what_is_out()
            return found.file_item is not None or found.goes_to_file

    def _spill_what_is_out(self) -> None:
        while self._spilling:
            item = self._spilling[0]
            if item.number in self._items and item.goes_to_file:
                if not self._device.is_complete(item.written.event):
                    return
                self._spill(item)
            self._spilling.popleft()

    def fetch(self, item: int) -> None:
        """Starts reading what is only in the file."""
        with self._lock:
            self._begin()
            self._fetch(self._find(item))

    def _fetch(self, item: Item) -> None:
        if item.slot is None and item.block is None and not item.fetched:
            self._file.reserve(item.file_item)
            item.fetched = True

    def _spill(self, item: Item) -> bool:
        if item.file_item is not None:
            return True
        if not self._can_spill or item.slot is None:
            return False
        self._order.host_read(item)
        item.goes_to_file = False
        self._settle(item)
        memory = self._memory(item)[: item.nbytes]
        self._device.touch_host(memory, writes=False)
        number = self._file.store([memory], [0], item.nbytes)
        if number < 0:
            self._stop_spilling()
            return False
        item.file_item = number
        self._counts.update(spills=1, spilled_bytes=item.nbytes)
        return True

    def _evict(self, item: Item) -> bool:
        """Waits until the item is in the file, and gives its slot away."""
        if not self._file.settle(item.file_item):
            self._release_in_file(item)
            self._stop_spilling()
            return False
        self._give_slot(item)
        return True

    def _release_in_file(self, item: Item) -> None:
        self._file.release(item.file_item)
        item.file_item = None
        self._can_spill = True

    def _stop_spilling(self) -> None:
        """Until something in the file is released. A file that failed refuses what comes after that, too."""
        if self._can_spill:
            self._can_spill = False
            self._failure = self._file.take_failure() or "the spill file is full"

    def _read_file(self, item: Item) -> None:
        """To a slot, if there is one, from which the copy back is faster; else `landing` is the file's buffer."""
        data = self._file.load(item.file_item)
        if item.fetched:
            self._file.unreserve(item.file_item)
            item.fetched = False
        slot = self._place(item.nbytes, -1)
        if slot is None:
            item.landing = data
            return
        self._order.host_write(slot)
        memory = slot.memory[: item.nbytes]
        self._device.touch_host(memory, writes=True)
        memory.copy_(data)
        slot.owner, item.slot, item.generation, item.ends = item, slot, slot.generation, {}

    # --- all of it ----------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Waits until all copies have ended, and lets go of the parts."""
        with self._lock:
            self._begin()
            for stream in (self._device.out_stream, self._device.back_stream):
                self._device.synchronize(self._device.record(stream))
            while self._writing:
                self._settle(self._writing[0])
            self._spill_what_is_out()
            if self._file is not None:
                self._file.synchronize()

    def take_failure(self) -> str:
        """Why copying out or making room failed since the last call, or an empty string."""
        failure, self._failure = self._failure, ""
        return failure

    def counters(self) -> dict[str, float]:
        """As Engine.counters. queue_seconds is 0: parts are waited for in the device's streams, as loads are.

        Blocks on the device come from the device's own allocator: buffer_allocations is 0.
        """
        with self._lock:
            self._forget_released()
            planned, needed = self._counts["planned_bytes"], self._counts["needed_bytes"]
            return {
                **{name: self._counts[name] for name in _COUNTED},
                "stall_seconds": self._device.stall_seconds() - self._stalled_before, "queue_seconds": 0.0,
                "slots": self._arena.slots, "peak_slots": self._arena.peak_slots,
                "slot_bytes": self._arena.bytes, "peak_slot_bytes": self._arena.peak_bytes,
                "extent_bytes": self._arena.extent, "growths": self._arena.growths, "buffer_allocations": 0,
                "file_bytes": 0 if self._file is None else self._file.counters()["slot_bytes"],
                "waste": 1 - needed / planned if planned else 0.0,
            }  # fmt: skip

    def reset_counters(self) -> None:
        with self._lock:
            self._counts.clear()
            self._stalled_before = self._device.stall_seconds()
            self._arena.reset_peaks()

    def close(self) -> None:
        """Waits for the copies under way and gives the memory back; what is still stored is lost."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._closing.alive:
                for item in self._items.values():
                    self._drop_block(item)
                    self._settle(item)
                    # Slot and owner know each other, and would hold the memory until a garbage collection.
                    item.slot = None
                self._items.clear()
                self._spilling.clear()
            self._closing()

    def _begin(self) -> None:
        if not self._closing.alive:
            raise RuntimeError("ActivationOffload: closed before its saved tensors were used")
        # First: a driver that is asked anything in a forked process fails with a message of its own.
        if os.getpid() != self._process:
            raise RuntimeError(
                "ActivationOffload: used in a process that was forked off its own; start processes with 'spawn'"
            )
        if self._device.is_capturing():
            raise RuntimeError(
                "ActivationOffload: can't be captured in a CUDA graph, whose replays would write to host memory that "
                "others have by then; capture the step without it, or run it as it is"
            )
        self._forget_released()
        self._spill_what_is_out()

    def _find(self, number: int) -> Item:
        item = self._items.get(number)
        if item is None:
            raise RuntimeError("ActivationOffload: the saved tensor was released before its use")
        return item


def _close(process: int, device: StreamDevice, arena: HostArena, file: Engine | None) -> None:
    # The device, its streams and the threads of the file are the process's that made them.
    if os.getpid() != process:
        return
    for stream in (device.out_stream, device.back_stream):
        device.synchronize(device.record(stream))
    # It may still read slots.
    if file is not None:
        file.close()
    arena.close()
