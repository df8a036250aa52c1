"""Planned slots, memory before a file, a modelled link, and how a file is written."""

import os
import threading
import time

import pytest
import torch

import pykern
from pykern.offload.engine import Engine, Link

from .support import (
    STORAGES,
    assert_bit_equal,
    bytes_of,
    descriptors,
    file_size_limit,
    gradients,
    in_a_process,
    loss_of,
    make,
)  # fmt: skip

PAGE = 4096


@pytest.fixture(params=STORAGES)
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "file" else None


def open_engine(folder, **options):
    return Engine(folder, **{"capacity": 32 << 20, "queue_bytes": 1 << 20, **options})


def store(engine, size, seed, **where):
    return engine.store([bytes_of(size, seed)], [0], size, **where)


def is_there(engine, item, size, seed):
    return torch.equal(engine.load(item), bytes_of(size, seed))


# --- planned slots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_seed", [None, 5])
def test_a_plan_allocates_nothing_after_its_first_step(folder, delay_seed):
    """Two blocks wait in slots while a third comes back, step after step, a little smaller than their slots."""
    sizes = [300_000, 200_000, 100_000]
    engine = open_engine(folder, slots=[size + 1000 for size in sizes], delay_seed=delay_seed)
    seen = []
    for step in range(4):
        items = [store(engine, size, step + slot, slot=slot) for slot, size in enumerate(sizes)]
        for item in items:
            assert engine.settle(item)
        engine.reserve(items[-1])
        for slot in (2, 1, 0):
            if slot:
                engine.reserve(items[slot - 1])
            assert is_there(engine, items[slot], sizes[slot], step + slot)
            engine.release(items[slot])
        engine.synchronize()
        counters = engine.counters()
        assert counters["slots"] == 0
        seen.append([counters[name] for name in ("growths", "buffer_allocations", "extent_bytes", "peak_slot_bytes")])
    assert seen[1:] == seen[:1] * 3
    assert engine.counters()["growths"] == 0
    assert engine.counters()["offloads"] == 12
    assert engine.counters()["waste"] == pytest.approx(3000 / 603_000)
    assert engine.counters()["waste"] < 0.02


def test_a_slot_is_taken_over_from_who_is_on_the_way_back(folder):
    for seed in range(30):
        engine = open_engine(folder, slots=[20_000], delay_seed=seed)
        first = store(engine, 20_000, 1, slot=0)
        if seed % 2:
            engine.settle(first)
        engine.reserve(first)
        second = store(engine, 19_000, 2, slot=0)
        engine.settle(second)
        for _ in range(2):
            assert is_there(engine, first, 20_000, 1)
            assert is_there(engine, second, 19_000, 2)
            assert engine.settle(first)
        # What has left its slot is kept in its buffer, reserved or not.
        engine.unreserve(first)
        engine.reserve(second)
        third = store(engine, 10, 3, slot=0)
        assert is_there(engine, first, 20_000, 1)
        engine.release(first)
        assert is_there(engine, second, 19_000, 2)
        engine.release(second)
        assert is_there(engine, third, 10, 3)
        engine.release(third)
        engine.synchronize()
        assert engine.counters()["slots"] == 0


def test_a_released_slot_is_free_once_its_copy_has_ended(folder):
    engine = open_engine(folder, slots=[5000], delay_seed=0)
    for seed in range(30):
        item = store(engine, 5000, seed, slot=0)
        assert is_there(engine, item, 5000, seed)
        engine.release(item)


def test_against_the_plan(folder):
    engine = open_engine(folder, slots=[5000, 100])
    item = store(engine, 5000, 1, slot=0)
    engine.settle(item)
    for size, slot, message in (
        (10, 0, f"slot 0 still belongs to item {item}, which was neither released nor reserved"),
        (101, 1, "a block of 101 bytes does not fit into slot 1 of 100"),
        (10, 2, "there is no slot 2, only 2 were planned"),
    ):
        with pytest.raises(RuntimeError, match=message):
            store(engine, size, 0, slot=slot)
    assert is_there(engine, item, 5000, 1)
    engine.synchronize()
    assert engine.counters()["slots"] == 1


def test_a_slot_that_can_not_be_read_is_not_taken_over(tmp_path):
    engine = open_engine(str(tmp_path), slots=[5000])
    item = store(engine, 5000, 1, slot=0)
    engine.settle(item)
    os.truncate(descriptors(tmp_path)[0], 0)
    engine.reserve(item)
    with pytest.raises(RuntimeError, match=f"slot 0 still holds item {item}, which can't be brought back: reading .*"):
        store(engine, 10, 2, slot=0)
    with pytest.raises(RuntimeError, match="the file ends there"):
        engine.load(item)


def test_slots_beside_others(folder):
    """Items without a slot never lie in one."""
    engine = open_engine(folder, slots=[10_000, 10_000], delay_seed=1)
    free = [store(engine, 10_000, seed) for seed in range(4)]
    planned = [store(engine, 9_000, 10 + slot, slot=slot) for slot in range(2)]
    free += [store(engine, 100, seed) for seed in range(4, 8)]
    engine.synchronize()
    for seed, item in enumerate(free):
        assert is_there(engine, item, 10_000 if seed < 4 else 100, seed)
    for slot, item in enumerate(planned):
        assert is_there(engine, item, 9_000, 10 + slot)


def test_slots_that_have_no_room(tmp_path):
    with pytest.raises(MemoryError, match="the slots take 131072 bytes, more than the capacity of 100000"):
        open_engine(None, capacity=100_000, slots=[65_536, 65_536])
    with pytest.raises(OSError, match="the slots take 131072 bytes, more than the capacity of 102400"):
        open_engine(str(tmp_path), capacity=100_000, slots=[65_536, 65_536])
    with pytest.raises(OSError, match="No space left on device"):
        open_engine(str(tmp_path), capacity=None, slots=[1 << 60])


# --- memory, then a file ----------------------------------------------------------------------------


def test_what_memory_has_no_room_for_goes_to_the_file(tmp_path):
    engine = open_engine(str(tmp_path), memory=64 << 10)
    assert engine.description.startswith("memory, then file")
    items = [store(engine, 16 << 10, seed) for seed in range(20)]
    engine.synchronize()
    counters = engine.counters()
    assert counters["slot_bytes"] == 20 * (16 << 10)
    assert counters["file_bytes"] >= 16 * (16 << 10)
    for seed, item in enumerate(items):
        assert is_there(engine, item, 16 << 10, seed)


def test_the_oldest_are_spilled(tmp_path):
    engine = open_engine(str(tmp_path), memory=256 << 10, threads=1)
    items = [store(engine, 16 << 10, seed) for seed in range(14)]
    engine.synchronize()
    assert engine.counters()["spills"] == 0
    engine.reserve(items[1])
    items.append(store(engine, 16 << 10, 14))
    engine.synchronize()
    # Three are too many; the second is wanted.
    counters = engine.counters()
    assert (counters["spills"], counters["spilled_bytes"], counters["file_bytes"]) == (
        3,
        3 * (16 << 10),
        3 * (16 << 10),
    )
    (descriptor,) = descriptors(tmp_path)
    with open(descriptor, "rb") as file:
        in_file = file.read(3 * (16 << 10))
    assert in_file == b"".join(bytes(bytes_of(16 << 10, seed).numpy()) for seed in (0, 2, 3))
    for seed, item in enumerate(items):
        assert is_there(engine, item, 16 << 10, seed)


def test_named_tiers(tmp_path):
    engine = open_engine(str(tmp_path), memory=64 << 10, slots=[16 << 10])
    in_file = store(engine, 5000, 1, tier="file")
    engine.settle(in_file)
    assert engine.counters()["file_bytes"] == 2 * PAGE
    planned = store(engine, 16 << 10, 2, slot=0)
    in_memory = [store(engine, 16 << 10, seed, tier="host") for seed in range(3, 6)]
    # Nothing else has room there, and nothing goes elsewhere than told.
    engine.reserve(in_memory[0])
    assert all(item > 0 for item in in_memory)
    assert store(engine, 32 << 10, 9, tier="host") == -1
    assert engine.take_failure() == ""
    engine.synchronize()
    for seed, item in enumerate([in_file, planned, *in_memory], start=1):
        assert is_there(engine, item, 5000 if seed == 1 else 16 << 10, seed)
    with pytest.raises(ValueError, match="tier: expected 'host', got 'file'"):
        store(open_engine(None), 10, 0, tier="file")


def test_activations_in_memory_and_a_file(tmp_path):
    model, x = make("transformer")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("memory+file", min_bytes=0, keep_last=0, capacity=300_000, path=tmp_path)
    for _ in range(3):
        with offload:
            loss = loss_of(model, x)
        offload.synchronize()
        stats = offload.stats()
        model.zero_grad()
        loss.backward()
        assert_bit_equal([parameter.grad for parameter in model.parameters()], plain)
    assert stats["kept"]["capacity"] == 0
    assert 0 < stats["slot_bytes"] - stats["file_bytes"] <= 300_000 < stats["slot_bytes"]
    assert stats["medium"].startswith("memory, then file")
    assert pykern.ActivationOffload("memory+file", path=tmp_path)._engine.tiers == ("host", "file")
    assert open_engine(str(tmp_path), memory=0).tiers == ("file",)


@pytest.mark.parametrize("transfers", ["best", "threads"])
def test_failed_spills_lose_nothing(tmp_path, transfers):
    engine = open_engine(str(tmp_path), threads=1, memory=1 << 18, transfers=transfers)
    with file_size_limit(1 << 14):
        items = [store(engine, 20_000, seed) for seed in range(20)]
        engine.synchronize()
        failure = engine.take_failure()
        assert failure.startswith("writing ")
        assert failure.endswith("File too large")
        assert engine.take_failure() == ""
        assert engine.counters()["spills"] == 0
        # Memory goes on, the file does not.
        kept = {seed: item for seed, item in enumerate(items) if item > 0}
        assert list(kept)[:12] == list(range(12))
        for seed, item in kept.items():
            assert is_there(engine, item, 20_000, seed)
        engine.release(items[0])
        again = store(engine, 20_000, 99)
        assert engine.settle(again)
        assert is_there(engine, again, 20_000, 99)
        assert store(engine, 20_000, 99, tier="file") == -1


# --- a modelled link --------------------------------------------------------------------------------


def test_copies_take_the_link_s_time_and_no_processor():
    size = 1 << 16
    engine = open_engine(None, threads=1, link=Link(out=size / 0.1, back=size / 0.05, latency=0.02))
    spent, begin = time.process_time(), time.perf_counter()
    item = store(engine, size, 1)
    engine.settle(item)
    out = time.perf_counter() - begin
    is_there(engine, item, size, 1)
    back = time.perf_counter() - begin - out
    spent = time.process_time() - spent
    assert out >= 0.12
    assert back >= 0.07
    assert spent < 0.1
    out, back = engine.measure(size, rounds=1)
    assert size / 2 < out <= size / 0.12
    assert size / 2 < back <= size / 0.07


def test_one_direction():
    """Three copies out and three back take the time of six, whoever makes them."""
    engine = open_engine(None, threads=2, link=Link(latency=0.04, directions=1))
    before = [store(engine, 100, seed) for seed in range(3)]
    engine.synchronize()
    begin = time.perf_counter()
    for item in before:
        engine.reserve(item)
        store(engine, 100, 9)
    engine.synchronize()
    assert time.perf_counter() - begin >= 0.24


def test_two_directions():
    """A long copy out does not hold up one back, even with one thread asked for."""
    engine = open_engine(None, threads=1, link=Link(out=1000.0))
    item = store(engine, 10, 1)
    engine.settle(item)
    begin = time.perf_counter()
    slow = store(engine, 800, 2)
    assert is_there(engine, item, 10, 1)
    assert engine.counters()["offloads"] == 1
    assert engine.settle(slow)
    assert time.perf_counter() - begin >= 0.8


# --- how a file is written --------------------------------------------------------------------------


@pytest.mark.parametrize("transfers", ["best", "threads"])
def test_transfers_cut_short_go_on(tmp_path, transfers):
    """Blocks of many transfers, whose parts lie as direct writes want them and otherwise, under short transfers and
    interruptions by seed."""
    memory = torch.zeros((6 << 20) + 2 * PAGE, dtype=torch.uint8)
    aligned = memory[-memory.data_ptr() % PAGE :][: 6 << 20]
    aligned.copy_(bytes_of(6 << 20))
    parts = [aligned[: 3 << 20], bytes_of(100_000, 1), aligned[3 << 20 : (3 << 20) + 5 * PAGE + 7], aligned[4 << 20 :]]
    offsets = [PAGE, (3 << 20) + PAGE, (3 << 20) + 30 * PAGE, 5 << 20]
    nbytes = 7 << 20
    for seed in range(8):
        engine = open_engine(str(tmp_path), queue_bytes=nbytes, delay_seed=seed, transfers=transfers)
        items = [engine.store(parts, offsets, nbytes) for _ in range(2)]
        for item in items:
            assert engine.settle(item)
            block = engine.load(item)
            for part, offset in zip(parts, offsets, strict=True):
                assert torch.equal(block[offset : offset + part.numel()], part)
        assert engine.counters()["reloads"] == 2


def test_transfers_are_told(tmp_path):
    best = open_engine(str(tmp_path)).description
    threads = open_engine(str(tmp_path), transfers="threads").description
    assert best in ("file, direct, io_uring", "file, direct, threads", "file, buffered")
    assert threads in ("file, direct, threads", "file, buffered")
    assert ("direct" in best) == ("direct" in threads)


def test_threads_where_io_uring_is_refused():
    """As containers do: the system call gets EPERM from a filter."""
    code = """
import ctypes, struct, tempfile, torch
import pykern
from pykern.offload.engine import Engine
from tests.offload.support import bytes_of
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # the filter's instructions
program = b"".join(struct.pack("=HBBI", *line) for line in (
    (LOAD, 0, 0, 0), (EQUAL, 0, 1, 425), (RETURN, 0, 0, 0x00050001), (RETURN, 0, 0, 0x7FFF0000)))
buffer = ctypes.create_string_buffer(program, len(program))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, ctypes.addressof(buffer))), 0, 0) == 0, ctypes.get_errno()
assert libc.syscall(425, 1, None) == -1 and ctypes.get_errno() == 1
engine = Engine(tempfile.mkdtemp(), capacity=1 << 24)
items = [engine.store([bytes_of(3 << 20, seed)], [0], 3 << 20) for seed in range(3)]
engine.synchronize()
for seed, item in enumerate(items):
    assert torch.equal(engine.load(item), bytes_of(3 << 20, seed))
print(engine.description)
"""
    assert in_a_process(code) in ("file, direct, threads\n", "file, buffered\n")


def test_blocks_of_many_threads_at_once(folder):
    """Four callers, each with items of its own."""
    engine = open_engine(folder, threads=3, delay_seed=2)
    failures = []

    def run(caller):
        for seed in range(caller, 40, 4):
            item = store(engine, 1000 * (seed + 1), seed)
            engine.settle(item)
            if not is_there(engine, item, 1000 * (seed + 1), seed):
                failures.append(seed)
            engine.release(item)

    callers = [threading.Thread(target=run, args=(caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert failures == []
    engine.synchronize()
    assert engine.counters()["slots"] == 0


def test_rates_are_measured(folder):
    engine = open_engine(folder, slots=[1 << 20])
    for slot in (-1, 0):
        rates = engine.measure(1 << 20, slot=slot)
        assert rates.out > 0
        assert rates.back > 0
        engine.synchronize()
        assert engine.counters()["slots"] == 0
    with pytest.raises(MemoryError, match="nbytes: no room to measure with 67108864 bytes"):
        engine.measure(64 << 20)
