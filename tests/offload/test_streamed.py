"""The engine for devices with streams: its state machine, its arena, its failures, and its second tier."""

import os
import re
import signal
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import pykern
from pykern.offload import host_arena
from pykern.offload.engine import Engine
from pykern.offload.hunting import HuntingDevice
from pykern.offload.simulated import SimulatedDevice
from pykern.offload.streamed import StreamedEngine

from .programs import Program
from .support import bytes_of

KIB = 1 << 10


class Recorder(SimulatedDevice):
    """Notes what the engine asks for."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.copies, self.packings, self.blocks, self.host = [], 0, 0, []

    def copy(self, stream, target, source):
        self.copies.append(("out" if stream is self.out_stream else "back", source.numel()))
        super().copy(stream, target, source)

    def pack(self, parts, offsets, block):
        self.packings += 1
        super().pack(parts, offsets, block)

    def allocate(self, nbytes):
        self.blocks += 1
        return super().allocate(nbytes)

    def allocate_host(self, nbytes):
        self.host.append(nbytes)
        return super().allocate_host(nbytes)


def slow():
    """Copies take long enough that nothing has ended when the next call comes."""
    return Recorder(latency=0.02)


@pytest.fixture(params=[1, 2], ids=["one stream", "two streams"])
def device(request):
    return Recorder(directions=request.param)


# --- the life of an item ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 63, 4095, 4096, 4097, 100_000])
def test_bytes_come_back(device, size):
    engine = StreamedEngine(device)
    item = engine.store([bytes_of(size)], [0], size)
    assert engine.settle(item)
    assert torch.equal(engine.load(item), bytes_of(size))
    assert engine.counters()["reloaded_bytes"] == size


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("packed_below", [0, 1000, 1 << 20])
def test_parts_come_back_at_their_offsets(device, packed_below, settled):
    sizes = [300, 5000, 1, 256, 0, 255, 2000]
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end = -(-(end + size) // 256) * 256
    parts = [bytes_of(size, seed) for seed, size in enumerate(sizes)]
    engine = StreamedEngine(device, packed_below=packed_below)
    item = engine.store(parts, offsets, end)
    if settled:
        engine.settle(item)
    block = engine.load(item)
    assert block.numel() == end
    for part, offset, size in zip(parts, offsets, sizes, strict=True):
        assert torch.equal(block[offset : offset + size], part)


def test_small_neighbours_go_in_one_copy_and_large_parts_by_themselves():
    device = Recorder()
    engine = StreamedEngine(device, packed_below=1000)
    sizes = [100, 200, 300, 5000, 100, 6000, 7000, 10, 20]
    offsets = [0, 256, 512, 1024, 6144, 6400, 12544, 19712, 19968]
    item = engine.store([bytes_of(size) for size in sizes], offsets, 20000)
    assert device.copies == [("out", 812), ("out", 5000), ("out", 100), ("out", 6000), ("out", 7000), ("out", 276)]
    assert (device.packings, device.blocks) == (2, 2)
    engine.settle(item)
    engine.load(item)
    assert device.copies[6:] == [("back", 20000)]


def test_one_block_until_nobody_wants_it(device):
    engine = StreamedEngine(device)
    item = engine.store([bytes_of(5000)], [0], 5000)
    engine.settle(item)
    first = engine.load(item)
    assert engine.load(item) is first
    engine.reserve(item)
    engine.reserve(item)
    engine.unreserve(item)
    assert engine.load(item) is first
    engine.unreserve(item)
    assert torch.equal(engine.load(item), bytes_of(5000))
    assert engine.counters()["reloads"] == 2


def test_reserved_bytes_are_there_in_time():
    device = slow()
    engine = StreamedEngine(device)
    item = engine.store([bytes_of(5000)], [0], 5000)
    engine.settle(item)
    engine.reserve(item)
    engine.synchronize()
    engine.reset_counters()
    engine.load(item)
    assert engine.counters()["stall_seconds"] == 0
    engine.unreserve(item)
    engine.load(item)
    assert engine.counters()["stall_seconds"] > 0.015


def test_what_is_still_on_its_way_is_forwarded():
    engine = StreamedEngine(slow(), packed_below=1000)
    source = bytes_of(5000)
    item = engine.store([source], [0], 5000)
    assert engine.load(item) is source
    parts = engine.store([bytes_of(300), bytes_of(5000)], [0, 512], 5512)
    engine.reserve(parts)
    engine.settle(parts)
    assert torch.equal(engine.load(parts)[512:], bytes_of(5000))
    counters = engine.counters()
    assert (counters["forwards"], counters["forwarded_bytes"], counters["reloads"]) == (2, 10512, 0)
    engine.unreserve(parts)
    assert torch.equal(engine.load(parts)[512:], bytes_of(5000))
    assert engine.counters()["reloads"] == 1


def test_sources_are_let_go():
    """After settle, or when more is under way than may be; not before."""
    engine = StreamedEngine(slow(), queue_bytes=10_000)
    sources = [bytes_of(4000, seed) for seed in range(4)]
    alive = [weakref.ref(source) for source in sources]
    items = []
    while sources:
        items.append(engine.store([sources.pop(0)], [0], 4000))
    assert [reference() is not None for reference in alive] == [False, False, True, True]
    engine.settle(items[2])
    assert alive[2]() is None
    engine.synchronize()
    assert alive[3]() is None
    for seed, item in enumerate(items):
        assert torch.equal(engine.load(item), bytes_of(4000, seed))


def test_released_and_closed(device):
    engine = StreamedEngine(device)
    item, other = (engine.store([bytes_of(100)], [0], 100) for _ in range(2))
    engine.release(item)
    engine.release(item)
    engine.unreserve(item)
    for use in (engine.load, engine.reserve, engine.settle, engine.spill, engine.fetch):
        with pytest.raises(RuntimeError, match="released before its use"):
            use(item)
    engine.close()
    engine.close()
    engine.release(other)
    with pytest.raises(RuntimeError, match="closed before its saved tensors were used"):
        engine.load(other)


def test_release_in_the_midst_of_anything():
    """A garbage collection may release within any call: it waits until the call has ended."""

    class Collecting(SimulatedDevice):
        def copy(self, stream, target, source):
            super().copy(stream, target, source)
            engine.release(first)

    engine = StreamedEngine(Collecting(), capacity=8192, growth=8192)
    first = 0
    first = engine.store([bytes_of(4000)], [0], 4000)
    second = engine.store([bytes_of(4000, 1)], [0], 4000)
    assert engine.counters()["slots"] == 1
    assert torch.equal(engine.load(second), bytes_of(4000, 1))


@pytest.mark.parametrize(
    ("parts", "offsets", "nbytes", "error", "message"),
    [
        ([torch.zeros(4)], [0], 16, TypeError, r"parts\[0\]: expected contiguous uint8 of one dimension, got torch.f"),
        ([bytes_of(8)[::2]], [0], 16, TypeError, r"parts\[0\]: expected contiguous uint8"),
        ([bytes_of(8)], [0, 256], 999, ValueError, r"offsets: expected one per part \(1\), got 2"),
        ([bytes_of(8)], [128], 999, ValueError, r"offsets\[0\]: expected a multiple of 256 from 0 on, got 128"),
        ([bytes_of(300), bytes_of(8)], [0, 256], 999, ValueError, r"offsets\[1\]: expected a multiple of 256 from 300"),
        ([bytes_of(300)], [0], 299, ValueError, "nbytes: expected room for the parts, which end at 300, got 299"),
    ],
)
def test_refused_blocks(device, parts, offsets, nbytes, error, message):
    with pytest.raises(error, match=message):
        StreamedEngine(device).store(parts, offsets, nbytes)


# --- the arena --------------------------------------------------------------------------------------------------------


def test_a_plan_allocates_once_and_wastes_little():
    device = Recorder()
    sizes = [700_001, 1_300_000, 400_000]
    engine = StreamedEngine(device, slot_bytes=sizes)
    for step in range(5):
        items = [engine.store([bytes_of(size, step)], [0], size, slot=slot) for slot, size in enumerate(sizes)]
        for item in items:
            engine.settle(item)
        for item, size in zip(items, sizes, strict=True):
            assert torch.equal(engine.load(item), bytes_of(size, step))
            engine.release(item)
    assert len(device.host) == 1
    counters = engine.counters()
    assert counters["extent_bytes"] == counters["peak_slot_bytes"] < 1.02 * sum(sizes)
    assert 0 < counters["waste"] < 0.02
    assert counters["growths"] == 0


def test_a_slot_of_the_plan_goes_on_when_its_block_is_back():
    """Its first item is on the device again, and stays there until it is released."""
    engine = StreamedEngine(slow(), slot_bytes=[5000])
    first = engine.store([bytes_of(5000)], [0], 5000, slot=0)
    engine.settle(first)
    with pytest.raises(
        RuntimeError, match="slot: the plan's slot 0 still holds item 1, which has been neither reserved"
    ):
        engine.store([bytes_of(5000, 1)], [0], 5000, slot=0)
    engine.reserve(first)
    second = engine.store([bytes_of(5000, 1)], [0], 5000, slot=0)
    engine.settle(second)
    engine.unreserve(first)
    assert torch.equal(engine.load(first), bytes_of(5000))
    assert torch.equal(engine.load(second), bytes_of(5000, 1))


def test_a_slot_of_the_plan_goes_on_when_its_block_never_left():
    engine = StreamedEngine(slow(), slot_bytes=[5000], packed_below=1000)
    parts, offsets = [bytes_of(300), bytes_of(4000)], [0, 512]
    first = engine.store(parts, offsets, 4512, slot=0)
    engine.reserve(first)
    second = engine.store([bytes_of(5000, 1)], [0], 5000, slot=0)
    for item in (first, second):
        engine.settle(item)
    block = engine.load(first)
    assert torch.equal(block[:300], parts[0]) and torch.equal(block[512:], parts[1])
    assert torch.equal(engine.load(second), bytes_of(5000, 1))
    engine.release(first)
    engine.release(second)
    assert engine.counters()["slots"] == 0


def test_a_slot_that_somebody_found_free_is_not_fought_for():
    engine = StreamedEngine(slow(), slot_bytes=[5000, 5000])
    items = [engine.store([bytes_of(5000, 0)], [0], 5000)]
    items += [engine.store([bytes_of(5000, seed)], [0], 5000, slot=0) for seed in (1, 2)]
    assert items[:2] == [1, 2] and items[2] == -1
    for seed in (0, 1):
        assert torch.equal(engine.load(items[seed]), bytes_of(5000, seed))


def test_slots_of_the_plan_are_checked():
    engine = StreamedEngine(Recorder(), slot_bytes=[5000, 0])
    for slot, size, message in (
        (2, 100, "expected one of the plan's 2 slots, got 2"),
        (1, 100, "expected one with room for 100 bytes, slot 1 has 0"),
        (0, 8193, "expected one with room for 8193 bytes, slot 0 has 8192"),
    ):
        with pytest.raises(RuntimeError, match=f"slot: {message}"):
            engine.store([bytes_of(size)], [0], size, slot=slot)
    with pytest.raises(RuntimeError, match="slot: expected one of the plan's 0 slots, got 0"):
        StreamedEngine(Recorder()).store([bytes_of(100)], [0], 100, slot=0)
    with pytest.raises(ValueError, match="tier: expected 'host', got 'file'"):
        engine.store([bytes_of(100)], [0], 100, tier="file")


def test_an_arena_without_a_plan_grows_and_then_stays():
    device = Recorder()
    engine = StreamedEngine(device, growth=64 * KIB)
    for step in range(4):
        items = [engine.store([bytes_of(size, step)], [0], size) for size in (30_000, 30_000, 100_000, 5)]
        for at in (2, 0, 3, 1):
            engine.settle(items[at])
            engine.release(items[at])
        if step == 0:
            grown = list(device.host)
    assert device.host == grown == [64 * KIB, -(-100_000 // 4096) * 4096, 64 * KIB]
    assert engine.counters()["slots"] == 0


def test_freed_neighbours_merge():
    engine = StreamedEngine(Recorder(), capacity=64 * KIB, growth=64 * KIB)
    items = [engine.store([bytes_of(8 * KIB)], [0], 8 * KIB) for _ in range(8)]
    assert engine.store([bytes_of(1)], [0], 1) == -1
    assert engine.take_failure() == ""
    for index in (1, 5, 3, 4, 2, 0, 7, 6):
        engine.release(items[index])
    large = engine.store([bytes_of(64 * KIB)], [0], 64 * KIB)
    engine.settle(large)
    assert torch.equal(engine.load(large), bytes_of(64 * KIB))


# --- failures ---------------------------------------------------------------------------------------------------------


def test_memory_for_slots_has_huge_pages_and_stays_out_of_forked_processes():
    memory = host_arena.map_pages(8 << 20)
    address = memory.data_ptr()
    kept = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        place = re.match(r"([0-9a-f]+)-([0-9a-f]+) ....", line)
        if place:
            kept = [line] if int(place[1], 16) <= address < int(place[2], 16) else []
        elif kept and line.startswith("VmFlags:"):
            break
        elif kept:
            kept.append(line)
    flags = line.split()
    assert "rw-p" in kept[0] and "hg" in flags and "dc" in flags


class OfOneProcess(SimulatedDevice):
    """As a driver, which answers nothing in a forked process."""

    def __init__(self):
        super().__init__()
        self.process = os.getpid()

    def is_capturing(self):
        assert os.getpid() == self.process
        return False

    def wait(self, *arguments, **keywords):
        assert os.getpid() == self.process
        super().wait(*arguments, **keywords)


def test_a_forked_process_leaves_the_engine_alone():
    """Its streams are threads, or a driver, which the new process does not have."""
    engine = StreamedEngine(OfOneProcess())
    item = engine.store([bytes_of(5000)], [0], 5000)
    engine.settle(item)
    engine.reserve(item)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            engine.load(item)
        except RuntimeError as error:
            engine.release(item)
            engine.close()
            engine = None
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    os.close(writing)
    with open(reading, encoding="utf-8") as told:
        assert told.read() == (
            "ActivationOffload: used in a process that was forked off its own; start processes with 'spawn'"
        )
    assert torch.equal(engine.load(item), bytes_of(5000))


def test_a_default_device_of_torch_changes_nothing():
    with torch.device("meta"):
        device = SimulatedDevice()
        assert device.allocate(10).device.type == device.allocate_host(4096).device.type == "cpu"
        assert all(one.out > 0 for one in pykern.measure_bandwidth("cpu", [1 << 12]))


def test_no_memory_for_the_plan():
    with pytest.raises(MemoryError, match=r"slot_bytes: no memory for 12288 bytes on the host.*9000 bytes for 2 slots"):
        StreamedEngine(Recorder(host_bytes=8192), slot_bytes=[4000, 5000])


def test_no_memory_to_grow():
    """What is out stays out, what isn't stays with its owner, and the reason is told once."""
    engine = StreamedEngine(Recorder(host_bytes=8192), growth=8192)
    items = [engine.store([bytes_of(4096, seed)], [0], 4096) for seed in range(4)]
    assert items[2:] == [-1, -1]
    assert engine.take_failure() == "no memory for 8192 bytes on the host, which has 0"
    assert engine.take_failure() == ""
    engine.synchronize()
    for seed in range(2):
        assert torch.equal(engine.load(items[seed]), bytes_of(4096, seed))


class Failing(SimulatedDevice):
    """Copies fail from the n-th on, as often as told."""

    def __init__(self, first, times=1):
        super().__init__()
        self.calls, self.first, self.times = 0, first, times

    def copy(self, stream, target, source):
        self.calls += 1
        if self.first <= self.calls < self.first + self.times:
            raise RuntimeError("the link is down")
        super().copy(stream, target, source)


def test_a_copy_out_that_fails_leaves_the_parts_to_the_caller():
    engine = StreamedEngine(Failing(2), capacity=8192, growth=8192, packed_below=0)
    parts = [bytes_of(1000), bytes_of(2000)]
    assert engine.store(parts, [0, 1024], 3024) == -1
    assert engine.take_failure() == "copying out of the simulated device failed: the link is down"
    counters = engine.counters()
    assert (counters["slots"], counters["offloads"]) == (0, 0)
    items = [engine.store([bytes_of(4096, seed)], [0], 4096) for seed in range(2)]
    engine.synchronize()
    assert [torch.equal(engine.load(item), bytes_of(4096, seed)) for seed, item in enumerate(items)] == [True, True]


def test_a_copy_back_that_fails_can_be_tried_again():
    engine = StreamedEngine(Failing(2))
    item = engine.store([bytes_of(3000)], [0], 3000)
    engine.settle(item)
    with pytest.raises(
        RuntimeError, match="copying back to the simulated device failed: the link is down; the bytes a"
    ):
        engine.load(item)
    assert torch.equal(engine.load(item), bytes_of(3000))
    assert engine.counters()["reloads"] == 1


def test_failures_are_free_of_races():
    class FailingAtRandom(HuntingDevice):
        def copy(self, stream, target, source):
            if self._random.random() < 0.2 and stream is self.out_stream and self._memory_of(target).is_host:
                raise RuntimeError("the link is down")
            super().copy(stream, target, source)

    assert sum(Program(seed, device_class=FailingAtRandom).run() for seed in range(100)) > 500


# --- the second tier --------------------------------------------------------------------------------------------------


def with_file(tmp_path, device, slots=3, file_bytes=1 << 20):
    file = Engine(str(tmp_path), capacity=file_bytes, threads=1)
    return StreamedEngine(device, slot_bytes=[8192] * slots, file=file), file


def test_a_full_arena_spills_its_oldest_items(tmp_path, device):
    engine, file = with_file(tmp_path, device)
    items = [engine.store([bytes_of(8000, seed)], [0], 8000) for seed in range(10)]
    assert min(items) > 0
    assert file.counters()["offloads"] >= 7
    for seed in reversed(range(10)):
        assert torch.equal(engine.load(items[seed]), bytes_of(8000, seed))
        engine.release(items[seed])
    file.synchronize()
    assert file.counters()["slots"] == engine.counters()["slots"] == 0


def test_what_is_spilled_and_still_in_its_slot_is_forwarded(tmp_path, device):
    engine, file = with_file(tmp_path, device)
    item = engine.store([bytes_of(8000)], [0], 8000)
    assert engine.spill(item)
    engine.synchronize()
    assert torch.equal(engine.load(item), bytes_of(8000))
    assert (file.counters()["offloads"], file.counters()["reloads"]) == (1, 0)


def test_nobody_waits_to_spill(tmp_path):
    class Gated(SimulatedDevice):
        gate = threading.Event()

        def copy(self, stream, target, source):
            stream.work.put(self.gate.wait)
            super().copy(stream, target, source)

    engine, _ = with_file(tmp_path, Gated())
    item = engine.store([bytes_of(8000)], [0], 8000)
    assert engine.spill(item)
    other = engine.store([bytes_of(8000)], [0], 8000)
    assert engine.spill(other)
    assert engine.counters()["spills"] == 0
    Gated.gate.set()
    engine.release(other)
    engine.synchronize()
    assert engine.counters()["spills"] == 1


def test_a_block_that_goes_to_the_file_gives_up_its_slot(tmp_path, device):
    engine, file = with_file(tmp_path, device, slots=1)
    for slot in (0, -1):
        first = engine.store([bytes_of(8000)], [0], 8000, slot=slot, tier="file")
        engine.settle(first)
        second = engine.store([bytes_of(8000, 1)], [0], 8000, slot=slot)
        counters = engine.counters()
        assert (counters["spills"], counters["spilled_bytes"], counters["file_bytes"]) == (1, 8000, 8192)
        engine.settle(second)
        assert torch.equal(engine.load(first), bytes_of(8000))
        assert torch.equal(engine.load(second), bytes_of(8000, 1))
        engine.release(first)
        engine.release(second)
        engine.reset_counters()


def test_fetched_items_are_read_ahead(tmp_path, device):
    engine, file = with_file(tmp_path, device)
    items = [engine.store([bytes_of(8000, seed)], [0], 8000) for seed in range(6)]
    file.synchronize()
    engine.fetch(items[0])
    engine.fetch(items[0])
    file.synchronize()
    assert file.counters()["reloads"] == 1
    engine.reserve(items[0])
    engine.reserve(items[1])
    for seed in (0, 1):
        assert torch.equal(engine.load(items[seed]), bytes_of(8000, seed))
    assert file.counters()["reloads"] == 2


def test_reading_needs_no_slot(tmp_path, device):
    """All slots hold what is on the device or has no other place: the copy back comes from the file's buffer."""
    engine, _ = with_file(tmp_path, device, slots=1)
    first = engine.store([bytes_of(8000)], [0], 8000)
    second = engine.store([bytes_of(8000, 1)], [0], 8000)
    engine.settle(second)
    engine.reserve(second)
    assert torch.equal(engine.load(first), bytes_of(8000))
    assert torch.equal(engine.load(second), bytes_of(8000, 1))


def test_closing_gives_the_memory_back_before_what_goes_on_to_the_file_is_there(tmp_path):
    device, given = slow(), []
    allocate_host = device.allocate_host
    device.allocate_host = lambda nbytes: given.append(allocate_host(nbytes)) or given[0]
    engine, _ = with_file(tmp_path, device)
    engine.store([bytes_of(5000)], [0], 5000, tier="file")
    memory = StorageWeakRef(given.pop().untyped_storage())
    engine.close()
    assert memory.expired()


def test_a_full_file_is_told_and_loses_nothing(tmp_path, device):
    engine, _ = with_file(tmp_path, device, file_bytes=16384)
    items = [engine.store([bytes_of(8000, seed)], [0], 8000) for seed in range(8)]
    assert items[5:] == [-1, -1, -1]
    assert "full" in engine.take_failure()
    # It is used again once something there is not needed any more.
    engine.release(items[0])
    items[5] = engine.store([bytes_of(8000, 5)], [0], 8000)
    assert items[5] > 0
    for seed in range(1, 6):
        assert torch.equal(engine.load(items[seed]), bytes_of(8000, seed))
