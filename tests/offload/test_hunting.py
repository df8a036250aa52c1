"""Races: a thousand random programs have none, and each that is planted is found."""

import pytest
import torch

from pykern.offload.engine import Engine
from pykern.offload.hunting import HuntingDevice, Race
from pykern.offload.ordering import Ordering
from pykern.offload.streamed import StreamedEngine

from .programs import Program


@pytest.mark.parametrize("first", range(0, 1000, 250))
def test_a_thousand_seeds_are_clean(first):
    stored = sum(Program(seed).run() for seed in range(first, first + 250))
    assert stored > 2000


def test_a_file_behind_the_slots_is_clean(tmp_path):
    spills = 0
    for seed in range(120):
        file = Engine(str(tmp_path), capacity=1 << 18, threads=1)
        program = Program(seed, file=file)
        program.run()
        spills += program.engine._counts["spills"]
    assert spills > 150


# --- planted races: the engine as it is, but for one thing ------------------------------------------------------------


class LateReadyEvent(Ordering):
    """Copies out without waiting for the work that makes the parts."""

    def copy_out(self, item):
        for end in item.slot.ends.values():
            self._device.wait(self._device.out_stream, end.event)


class SlotReusedBeforeItsCopyEnded(Ordering):
    """Copies into a slot while the bytes of its last owner are still on their way back."""

    def copy_out(self, item):
        self._device.wait(self._device.out_stream, item.ready.event)


class SourcesDroppedEarly(Ordering):
    """Lets the parts go while they are being copied."""

    def drop_sources(self, item):
        pass


class HandedOutEarly(Ordering):
    """Gives the block to whoever wants it before it is back."""

    def use(self, item, stream):
        pass


class CopiedBackIntoMemoryInUse(Ordering):
    """Copies back before the stream that allocates the block has come to that point."""

    def copy_in(self, item, allocated):
        self._device.wait(self._device.back_stream, item.written.event)


class CopiedBackBeforeItWasOut(Ordering):
    """Copies back while the copy out still runs; one stream for both directions would hide it."""

    def copy_in(self, item, allocated):
        self._device.wait(self._device.back_stream, allocated.event)


class BlockDroppedEarly(Ordering):
    """Lets a block go whose copy back, or whose use in another stream, has not ended."""

    def drop_block(self, item):
        pass


class SlotGivenAwayTooEarly(StreamedEngine):
    """The slot is free as soon as the parts are gone."""

    def _drop_sources(self, item):
        super()._drop_sources(item)
        if item.slot is not None and item.number in self._items and item.slot.generation == item.generation:
            self._arena.give(item.slot, item.ends)


class SlotGivenAwayUnnoticed(SlotGivenAwayTooEarly):
    """The same, and no generation is compared."""

    def _check_generation(self, item):
        pass


class SpilledEarly(Ordering):
    """Writes a slot to the file while the copy into it still runs."""

    def host_read(self, item):
        pass


class ReadIntoASlotInUse(Ordering):
    """Reads from the file into a slot from which another block is still being copied back."""

    def host_write(self, slot):
        pass


class StaleKey(StreamedEngine):
    """Numbers of released items are given again, as addresses are."""

    def store(self, parts, offsets, nbytes, **place):
        self._next_item = min(set(range(1, 100)) - set(self._items)) - 1
        return super().store(parts, offsets, nbytes, **place)


class OneStreamForEver(HuntingDevice):
    """Tells the stream that computed first, whatever computes now."""

    def compute_stream(self):
        return self.streams[0]


class FreedWhereAllocated(HuntingDevice):
    """Memory goes back to the stream that allocated it at once, whichever stream lets go of it."""

    def free(self, block, stream):
        super().free(block, self._memory_of(block).home)


RACES = [
    (LateReadyEvent, 2, r"the (forward|packing) .*\(writes, compute\) and the copy out \(reads, copies out\)"),
    (SlotReusedBeforeItsCopyEnded, 2, r"host memory.*copy back \(reads.* copy out \(writes"),
    (SourcesDroppedEarly, 2, r"block \d+, .*copy out \(reads, copies out\) and the freeing \(writes"),
    (HandedOutEarly, 2, r"block \d+, .*copy back \(writes, copies back\) and the .*backward"),
    (CopiedBackIntoMemoryInUse, 2, r"block \d+, .*the allocation \(writes.* and the copy back \(writes"),
    (CopiedBackBeforeItWasOut, 2, r"host memory.*copy out \(writes, copies out\) and the copy back \(reads"),
    (BlockDroppedEarly, 2, r"block \d+, .* and the freeing \(writes"),
    (LateReadyEvent, 1, r"copies, or the host before it, has to wait for an event of (second )?compute after the "),
    (SourcesDroppedEarly, 1, r"copy out \(reads, copies\) and the freeing"),
    (HandedOutEarly, 1, r"copy back \(writes, copies\) and the .*backward"),
    (CopiedBackIntoMemoryInUse, 1, r"the allocation \(writes.* and the copy back \(writes"),
    (BlockDroppedEarly, 1, r"block \d+, .* and the freeing \(writes"),
    (SlotGivenAwayUnnoticed, 2, r"comes after they were freed|expected bytes|not in order"),
]


def first_failure(seeds, engine=StreamedEngine, file=lambda: None, **program):
    if issubclass(engine, Ordering):
        engine = type(engine.__name__, (StreamedEngine,), {"ordering": engine})
    for seed in range(seeds):
        running = Program(seed, engine_class=engine, file=file(), **program)
        try:
            running.run()
        except (AssertionError, RuntimeError) as error:
            # Closing it would do what is left, and find the race again.
            running.engine._closing.detach()
            return error
    return None


@pytest.mark.parametrize("engine, directions, message", RACES, ids=[f"{r[0].__name__}-{r[1]}" for r in RACES])
def test_a_planted_race_is_found(engine, directions, message):
    with pytest.raises(Race, match=message):
        raise first_failure(20, engine, directions=directions)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            SpilledEarly,
            r"copy out \(writes, copies.*\) and the reading \(reads, the host\) are not .* the host has to wait",
        ),
        (ReadIntoASlotInUse, r"copy (back|out) \(.*, copies.*\) and the writing \(writes, the host\) are not in order"),
    ],
)
def test_a_race_with_the_host_is_found(tmp_path, engine, message):
    with pytest.raises(Race, match=message):
        raise first_failure(40, engine, file=lambda: Engine(str(tmp_path), capacity=1 << 18, threads=1))


def test_a_cached_stream_is_found():
    with pytest.raises(Race, match="not in order|is freed in compute, but was allocated in second compute"):
        raise first_failure(20, device_class=OneStreamForEver)


def test_memory_that_does_not_wait_for_who_let_it_go_is_found():
    with pytest.raises(Race, match=r"block \d+, .*(copy out|backward|forward|packing).* and the freeing \(writes"):
        raise first_failure(20, device_class=FreedWhereAllocated)


def test_a_stale_key_is_found():
    with pytest.raises(AssertionError, match=r"item \d+ was released, and is handed out again"):
        raise first_failure(20, StaleKey)


def test_a_slot_of_another_generation_is_refused():
    with pytest.raises(RuntimeError, match=r"the slot of item \d+ was given away: it is of generation -?\d+, the item"):
        raise first_failure(20, SlotGivenAwayTooEarly)


# --- the device itself ------------------------------------------------------------------------------------------------


def test_what_runs_when_is_drawn_by_the_seed():
    """Streams with nothing between them are done in many orders, and the same seed gives the same one."""

    def order(seed):
        device, done = HuntingDevice(seed), []
        for index in range(6):
            for stream in device.streams:
                device._put(stream, "note", lambda index=index, stream=stream: done.append((stream.name, index)))
        device.finish()
        return tuple(done)

    orders = {order(seed) for seed in range(20)}
    assert len(orders) == 20
    assert order(3) == order(3)


def test_fresh_and_freed_memory_is_poisoned():
    device = HuntingDevice(0)
    block = device.allocate(100)
    device.launch("early use", reads=[(block, 7)])
    with pytest.raises(Race, match=r"early use reads block 1: expected bytes 7, found \[165\]"):
        device.finish()
    block = device.allocate(100)
    device.free(block, device.current)
    device.finish()
    assert bool((block == 0xDD).all())
    with pytest.raises(Race, match=r"block 2, bytes 0 to 100: the use \(writes, compute\) comes after they were freed"):
        device.launch("use", writes=[(block, 1)])


def test_an_event_that_the_host_waited_for_puts_in_order():
    device = HuntingDevice(0)
    block = device.allocate(100)
    host = device.allocate_host(4096)
    device.wait(device.out_stream, device.record(device.current))
    device.copy(device.out_stream, host[:100], block)
    ended = device.record(device.out_stream)
    with pytest.raises(
        Race, match="compute, or the host before it, has to wait for an event of copies out after the c"
    ):
        device.launch("writing", writes=[(block, 1)])
    device.synchronize(ended)
    device.launch("writing", writes=[(block, 1)])
    device.finish()


def test_streams_that_wait_for_each_other_are_told():
    device = HuntingDevice(0)
    later = device.record(device.second)
    later.position += 1
    device.wait(device.current, later)
    with pytest.raises(RuntimeError, match="wait for each other for ever: compute for second compute"):
        device.synchronize(device.record(device.current))


def test_memory_of_a_model_must_outlive_its_copy():
    device = HuntingDevice(0, lags=False)
    device._eagerness = [0.0] * len(device.streams)
    host = device.allocate_host(4096)
    source = torch.full((100,), 3, dtype=torch.uint8)
    device.copy(device.out_stream, host[:100], source)
    device.synchronize(device.record(device.out_stream))
    assert bool((host[:100] == 3).all())
    device.copy(device.out_stream, host[:100], source)
    del source
    with pytest.raises(Race, match="memory of the model: the copy out .* comes after it was freed"):
        device.synchronize(device.record(device.out_stream))
