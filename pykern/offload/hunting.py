"""A device on which a race is an error: a seed draws what runs when, and every access is checked for its order."""

import random
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .host_arena import map_pages

POISON_FRESH, POISON_FREED = 0xA5, 0xDD
"""What memory holds that was allocated and not written yet, and that was freed."""


class Race(AssertionError):
    """Two accesses to the same bytes that nothing puts in order, an access to freed bytes, or bytes that are not the
    expected ones."""


class HuntedStream:
    """Work that has been given, and not yet done. `clock` counts, per stream, what is known to come before."""

    __slots__ = ("clock", "done", "given", "host_version", "index", "name", "work")

    def __init__(self, index: int, name: str, streams: int) -> None:
        self.index, self.name = index, name
        self.clock = [0] * streams
        self.host_version = 0
        self.work: deque[tuple[HuntedEvent | None, Callable[[], None] | None]] = deque()
        self.given = self.done = 0

    def __repr__(self) -> str:
        return f"HuntedStream({self.name!r})"


class HuntedEvent:
    __slots__ = ("clock", "position", "stream")

    def __init__(self, stream: HuntedStream) -> None:
        self.stream, self.position, self.clock = stream, stream.given, tuple(stream.clock)

    def is_complete(self) -> bool:
        return self.stream.done >= self.position


class _Access:
    __slots__ = ("begin", "end", "stream", "tick", "what", "writes")

    def __init__(self, begin: int, end: int, stream: HuntedStream, writes: bool, what: str) -> None:
        self.begin, self.end, self.stream, self.writes, self.what = begin, end, stream, writes, what
        self.tick = stream.clock[stream.index]


class _Memory:
    """One allocation, the accesses that a later one could conflict with, and the ranges that are free."""

    __slots__ = ("accesses", "bytes", "free", "home", "is_host", "is_lent", "name")

    def __init__(self, name: str, memory: Tensor, is_host: bool, home: HuntedStream | None) -> None:
        self.name, self.bytes, self.is_host, self.home = name, memory, is_host, home
        self.accesses: list[_Access] = []
        self.free: list[tuple[int, int]] = []
        self.is_lent = False


class HuntingDevice:
    """A StreamDevice whose streams are queues. Each call may do some of what they hold; which, is drawn by `seed`.

    Two independent nets. The order of any two accesses to the same bytes, one of which writes, must follow from streams
    and events; that is checked when they are put into their streams, so a missing wait is found on every seed,
    whatever happens first. And memory that was not written yet, or was freed, holds poison: `launch` compares what it
    reads.

    lags: the host runs ahead of the computing streams, whose work is given by `launch`, and freeing memory is work that
    takes its place in the stream that allocated it, as a caching allocator has it. Without, the tensors of a running
    model can be used: the computing stream is the caller and has always done everything, and freed device memory is
    left alone, since the model may hold it; a tensor that nobody but its copy needs any more must still be alive.

    directions: 2 if copies out and back have a stream each, 1 if they share it. host_bytes: of `allocate_host`.
    """

    name = "the hunting device"

    def __init__(self, seed: int, *, directions: int = 2, lags: bool = True, host_bytes: int | None = None) -> None:
        self.lags = lags
        self._random = random.Random(seed)
        names = ["compute", "second compute", "copies out", "copies back"][: 2 + directions]
        if directions == 1:
            names[2] = "copies"
        self._host = HuntedStream(0, "the host", len(names) + 1)
        self.streams = [HuntedStream(index + 1, name, len(names) + 1) for index, name in enumerate(names)]
        self.current, self.second, self.out_stream = self.streams[:3]
        self.back_stream = self.streams[-1]
        self._eagerness = [self._random.choice((0.02, 0.3, 1.0)) for _ in self.streams]
        self._host_version = 0
        self._memories: dict[int, _Memory] = {}
        self._blocks = 0
        self._host_left = host_bytes

    # --- what an engine uses ------------------------------------------------------------------------

    def compute_stream(self) -> HuntedStream:
        return self.current

    def accepts(self, tensor: Tensor) -> bool:
        return not self.lags and tensor.device.type == "cpu"

    def is_capturing(self) -> bool:
        return False

    def record(self, stream: HuntedStream) -> HuntedEvent:
        self._know_host(stream)
        return HuntedEvent(stream)

    def wait(self, stream: HuntedStream, event: HuntedEvent, measured: bool = False) -> None:
        self._know_host(stream)
        stream.clock = _later(stream.clock, event.clock)
        self._give(stream, event, None)

    def is_complete(self, event: HuntedEvent) -> bool:
        if event.is_complete():
            self.synchronize(event)
            return True
        return False

    def synchronize(self, event: HuntedEvent) -> None:
        while not event.is_complete():
            self._do_one()
        self._host.clock = _later(self._host.clock, event.clock)
        self._host_version += 1

    def stall_seconds(self) -> float:
        return 0.0

    def allocate(self, nbytes: int) -> Tensor:
        self._blocks += 1
        block = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        self._add(f"block {self._blocks}", block, False, self.current)
        self._put(self.current, "allocation", lambda: block.fill_(POISON_FRESH), writes=[block])
        return block

    def free(self, block: Tensor, stream: HuntedStream) -> None:
        memory = self._memory_of(block)
        if not self.lags:
            if memory is not None:
                del self._memories[block.untyped_storage().data_ptr()]
            return
        if memory.home is not stream and not memory.is_lent:
            raise Race(f"{memory.name} is freed in {stream.name}, but was allocated in {memory.home.name}")
        self._put(stream, "freeing", lambda: block.fill_(POISON_FREED), writes=[block])
        memory.free.append(_range_of(block))

    def copy(self, stream: HuntedStream, target: Tensor, source: Tensor) -> None:
        if target.numel() != source.numel():
            raise ValueError(f"copy: expected equal sizes, got {target.numel()} and {source.numel()}")
        out = self._memory_of(source) is None or not self._memory_of(source).is_host
        if self._memory_of(source) is None:
            run = _copy_of_borrowed(target, source)
        else:
            run = lambda: target.copy_(source)  # noqa: E731
        self._put(stream, "copy out" if out else "copy back", run, [source], [target])

    def pack(self, parts: Sequence[Tensor], offsets: Sequence[int], block: Tensor) -> None:
        parts, offsets = list(parts), list(offsets)

        def run() -> None:
            for part, offset in zip(parts, offsets, strict=True):
                block[offset : offset + part.numel()].copy_(part)

        self._put(self.current, "packing", run, parts, [block])

    def allocate_host(self, nbytes: int) -> Tensor:
        if self._host_left is not None:
            if nbytes > self._host_left:
                raise MemoryError(f"no memory for {nbytes} bytes on the host, which has {self._host_left}")
            self._host_left -= nbytes
        memory = map_pages(nbytes)
        self._add("host memory", memory, True, None)
        memory.fill_(POISON_FRESH)
        return memory

    def free_host(self, memory: Tensor) -> None:
        del self._memories[memory.untyped_storage().data_ptr()]

    def touch_host(self, memory: Tensor, writes: bool) -> None:
        self._host.clock[0] += 1
        self._check(memory, self._host, writes, "writing" if writes else "reading")
        self._host_version += 1

    def forget_host(self, memory: Tensor) -> None:
        begin, end = _range_of(memory)
        self._memory_of(memory).free.append((begin, end))

    # --- what a test uses ---------------------------------------------------------------------------

    def lend(self, nbytes: int) -> Tensor:
        """A tensor of the model's, which the engine may get, and let go of, in another stream than this."""
        block = self.allocate(nbytes)
        self._memory_of(block).is_lent = True
        return block

    def launch(
        self, what: str, reads: Sequence[tuple[Tensor, int]] = (), writes: Sequence[tuple[Tensor, int]] = ()
    ) -> None:
        """Work in the stream that computes now. Beside each tensor, the value that all its bytes must have, or get."""

        def run() -> None:
            for tensor, value in reads:
                if not bool((tensor == value).all()):
                    found = sorted(set(tensor.tolist()))
                    raise Race(f"{what} reads {self._name_of(tensor)}: expected bytes {value}, found {found}")
            for tensor, value in writes:
                tensor.fill_(value)

        self._put(self.current, what, run, [tensor for tensor, _ in reads], [tensor for tensor, _ in writes])

    def finish(self) -> None:
        """Does everything that is left."""
        while any(stream.work for stream in self.streams):
            self._do_one()

    # --- order --------------------------------------------------------------------------------------

    def _know_host(self, stream: HuntedStream) -> None:
        if stream.host_version != self._host_version:
            stream.clock = _later(stream.clock, self._host.clock)
            stream.host_version = self._host_version

    def _put(
        self,
        stream: HuntedStream,
        what: str,
        run: Callable[[], object],
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
    ) -> None:
        self._know_host(stream)
        stream.clock[stream.index] += 1
        for tensor in reads:
            self._check(tensor, stream, False, what)
        for tensor in writes:
            self._check(tensor, stream, True, what)
        self._give(stream, None, run)

    def _check(self, tensor: Tensor, stream: HuntedStream, writes: bool, what: str) -> None:
        memory = self._memory_of(tensor)
        if memory is None:
            return
        begin, end = _range_of(tensor)
        access = _Access(begin, end, stream, writes, what)
        self._check_free(memory, access)
        kept = []
        for other in memory.accesses:
            if other.begin < end and begin < other.end:
                if (writes or other.writes) and stream.clock[other.stream.index] < other.tick:
                    raise Race(
                        f"{memory.name}, bytes {max(begin, other.begin)} to {min(end, other.end)}: {_told(other)} and "
                        f"{_told(access)} are not in order; {_waiter(stream)} has to wait for an event of "
                        f"{other.stream.name} after the {other.what}"
                    )
                if (
                    begin <= other.begin
                    and other.end <= end
                    and (writes or other.stream is stream and not other.writes)
                ):
                    continue
            kept.append(other)
        kept.append(access)
        memory.accesses = kept

    @staticmethod
    def _check_free(memory: _Memory, access: _Access) -> None:
        left = []
        for begin, end in memory.free:
            if end <= access.begin or access.end <= begin:
                left.append((begin, end))
            elif memory.is_host and access.writes:
                left += [(begin, access.begin)] if begin < access.begin else []
                left += [(access.end, end)] if access.end < end else []
            # A copy back also reads the gaps between parts, which may never have been written.
            elif memory.is_host and (access.begin < begin or end < access.end):
                left.append((begin, end))
            else:
                raise Race(f"{memory.name}, bytes {begin} to {end}: {_told(access)} comes after they were freed")
        memory.free = left

    def _add(self, name: str, memory: Tensor, is_host: bool, home: HuntedStream | None) -> None:
        self._memories[memory.untyped_storage().data_ptr()] = _Memory(name, memory, is_host, home)

    def _memory_of(self, tensor: Tensor) -> _Memory | None:
        return self._memories.get(tensor.untyped_storage().data_ptr())

    def _name_of(self, tensor: Tensor) -> str:
        memory = self._memory_of(tensor)
        return "memory of the model" if memory is None else memory.name

    # --- time ---------------------------------------------------------------------------------------

    def _give(self, stream: HuntedStream, event: HuntedEvent | None, run: Callable[[], object] | None) -> None:
        stream.work.append((event, run))
        stream.given += 1
        if not self.lags and stream in self.streams[:2]:
            while stream.work:
                self._do_one()
            self._host.clock = _later(self._host.clock, stream.clock)
            self._host_version += 1
        while self._random.random() < 0.4:
            at = int(self._random.random() * len(self.streams))
            if self._random.random() < self._eagerness[at]:
                self._do_next_of(self.streams[at])

    def _do_one(self) -> None:
        first = int(self._random.random() * len(self.streams))
        for index in range(len(self.streams)):
            if self._do_next_of(self.streams[(first + index) % len(self.streams)]):
                return
        waiting = ", ".join(f"{s.name} for {s.work[0][0].stream.name}" for s in self.streams if s.work)
        raise RuntimeError(f"the streams wait for each other for ever: {waiting or 'nothing is left to do'}")

    @staticmethod
    def _do_next_of(stream: HuntedStream) -> bool:
        if not stream.work:
            return False
        event, run = stream.work[0]
        if event is not None and not event.is_complete():
            return False
        stream.work.popleft()
        stream.done += 1
        if run is not None:
            run()
        return True


def _later(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a if a > b else b for a, b in zip(one, other, strict=True)]


def _range_of(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.storage_offset()
    return begin, begin + tensor.numel()


def _waiter(stream: HuntedStream) -> str:
    return stream.name if stream.index == 0 else f"{stream.name}, or the host before it,"


def _told(access: _Access) -> str:
    return f"the {access.what} ({'writes' if access.writes else 'reads'}, {access.stream.name})"


def _copy_of_borrowed(target: Tensor, source: Tensor) -> Callable[[], None]:
    """Copies from memory that is the model's, and doesn't keep it alive meanwhile."""
    storage, begin, size = StorageWeakRef(source.untyped_storage()), source.storage_offset(), source.numel()

    def run() -> None:
        if storage.expired():
            raise Race("memory of the model: the copy out (reads, copies out) comes after it was freed")
        alive = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
        target.copy_(torch.empty(0, dtype=torch.uint8).set_(alive, begin, (size,)))

    return run


__all__ = ["HuntedEvent", "HuntedStream", "HuntingDevice", "Race"]
