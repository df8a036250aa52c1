"""Items of many parts: one block of bytes, written from where its tensors lie."""

import threading
import weakref
from random import Random

import pytest
import torch

from pykern.offload.engine import Engine, Link

from .support import STORAGES, bytes_of, descriptors, file_size_limit


@pytest.fixture(params=STORAGES)
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "file" else None


def open_engine(folder, **options):
    return Engine(folder, **{"capacity": 8 << 20, **options})


def layout(sizes, gaps):
    """Offsets of parts with these gaps before them, and the block's size with the last gap behind."""
    offsets, end = [], 0
    for size, gap in zip(sizes, gaps, strict=False):
        offsets.append(end + gap)
        end += gap + size
    return offsets, end + (gaps[len(sizes)] if len(gaps) > len(sizes) else 0)


def assert_parts(block, parts, offsets):
    for part, offset in zip(parts, offsets, strict=True):
        assert torch.equal(block[offset : offset + part.numel()], part)


LAYOUTS = [
    ([], [100]),
    ([], [0]),
    ([0], [5]),
    ([1], [0]),
    ([10, 0, 20], [0, 0, 0]),
    ([4096, 4096], [0, 0]),
    ([4095, 2, 4097], [1, 3, 5, 7]),
    ([10_000, 1, 300_000], [4096, 2288, 4095, 9000]),
    ([(4 << 20) - 5, 10, 1 << 20], [0, 0, 0]),
    ([100] * 50, [156] * 50),
]


@pytest.mark.parametrize(("sizes", "gaps"), LAYOUTS)
def test_blocks_come_back(folder, sizes, gaps):
    offsets, nbytes = layout(sizes, gaps)
    parts = [bytes_of(size, seed=index) for index, size in enumerate(sizes)]
    engine = open_engine(folder, delay_seed=3)
    # The order of the parts does not matter.
    item = engine.store([part.clone() for part in reversed(parts)], offsets[::-1], nbytes)
    early = engine.load(item)
    assert engine.settle(item)
    late = engine.load(item)
    for block in (early, late):
        assert block.dtype == torch.uint8
        assert block.shape == (nbytes,)
        assert_parts(block, parts, offsets)
    # In the hunting mode what lies between the parts is poison.
    between = torch.ones(nbytes, dtype=torch.bool)
    for part, offset in zip(parts, offsets, strict=True):
        between[offset : offset + part.numel()] = False
    assert (late[between] == 255).all()


def test_parts_at_odd_addresses(folder):
    whole = bytes_of(50_000)
    parts, offsets = [whole[1:4001], whole[4003:30_000], whole[30_001:]], [64, 8192, 40_960]
    engine = open_engine(folder)
    item = engine.store(parts, offsets, 65_536)
    engine.settle(item)
    assert_parts(engine.load(item), parts, offsets)


def test_settled_items_have_no_parts(folder):
    """The sources die in settle, not before the block is written, even where the item is reserved."""
    for reserved in (False, True):
        engine = open_engine(folder, threads=1, delay_seed=0)
        parts = [bytes_of(5000, seed=index) for index in range(3)]
        expected = [part.clone() for part in parts]
        alive = [weakref.ref(part) for part in parts]
        item = engine.store(parts, [0, 8192, 16_384], 24_576)
        del parts
        assert all(reference() is not None for reference in alive)
        if reserved:
            engine.reserve(item)
        assert engine.settle(item)
        assert [reference() for reference in alive] == [None] * 3
        assert_parts(engine.load(item), expected, [0, 8192, 16_384])
        assert engine.counters()["reloads"] == 1
        assert engine.settle(item)


def test_settle_is_for_one_item(folder):
    engine = open_engine(folder, threads=1, link=Link(latency=0.05))
    items = [engine.store([bytes_of(1000, seed=seed)], [0], 1000) for seed in range(20)]
    engine.settle(items[-1])
    # It went ahead of those queued before it.
    assert engine.counters()["offloads"] < 20
    for seed, item in enumerate(items[:-1]):
        assert torch.equal(engine.load(item), bytes_of(1000, seed=seed))
        engine.release(item)


def test_settle_of_released_items(folder):
    engine = open_engine(folder, threads=1, delay_seed=0)
    item = engine.store([bytes_of(10)], [0], 10)
    engine.release(item)
    with pytest.raises(RuntimeError, match="released before its use"):
        engine.settle(item)


def test_released_while_settling(folder):
    engine = open_engine(folder, threads=1, delay_seed=0)
    for _ in range(20):
        item = engine.store([bytes_of(10)], [0], 10)
        releasing = threading.Thread(target=engine.release, args=(item,))
        releasing.start()
        try:
            engine.settle(item)
        except RuntimeError as error:
            assert "released" in str(error)
        releasing.join()
    engine.synchronize()
    assert engine.counters()["slots"] == 0


def test_loads_of_a_block_in_flight_share_one_buffer(folder):
    engine = open_engine(folder, threads=2, delay_seed=0)
    item = engine.store([bytes_of(100), bytes_of(100, seed=1)], [0, 100], 200)
    first, second = engine.load(item), engine.load(item)
    assert first.data_ptr() == second.data_ptr()
    counters = engine.counters()
    assert counters["forwards"] + counters["reloads"] == 1


def test_races_are_told(folder):
    """A part that changes before it is written, a slot that somebody else wrote into: errors, not wrong bytes."""
    engine = open_engine(folder, threads=1, delay_seed=0, link=Link(out=5e5))
    part = bytes_of(5000)
    items = [engine.store([bytes_of(5000), part], [0, 8192], 13_192) for _ in range(20)]
    part[7] ^= 1
    engine.synchronize()
    with pytest.raises(RuntimeError, match=f"item {items[-1]} is not what was stored: its parts changed before"):
        engine.load(items[-1])
    if folder is not None:
        item = engine.store([bytes_of(5000)], [0], 5000)
        engine.settle(item)
        (descriptor,) = descriptors(folder)
        with open(descriptor, "r+b", buffering=0) as file:
            file.write(b"\0" * (1 << 20))
        with pytest.raises(RuntimeError, match="or somebody else wrote into its slot"):
            engine.load(item)


@pytest.mark.parametrize("storage", [*STORAGES, "memory+file"])
def test_many_seeds(storage, tmp_path):
    """Histories of blocks under random delays, cut transfers and poison; every step against a dictionary."""
    contents = bytes_of(50_000)
    folder = None if storage == "memory" else str(tmp_path)
    refused = 0
    for seed in range(100):
        random = Random(seed)
        engine = Engine(
            folder,
            capacity=1 << 16,
            threads=1 + seed % 3,
            queue_bytes=1 << 14,
            delay_seed=seed,
            memory=1 << 15 if storage == "memory+file" else None,
            transfers="threads" if seed % 8 else "best",  # making a ring takes its time
        )
        expected, reserved = {}, set()
        for _ in range(24):
            action = random.randrange(7)
            if action <= 2 or not expected:
                sizes = [random.randrange(5000) for _ in range(random.randrange(4))]
                offsets, nbytes = layout(sizes, [random.choice([0, 0, random.randrange(8000)]) for _ in range(4)])
                parts = [contents[random.randrange(45_000) :][:size] for size in sizes]
                item = engine.store([part.clone() for part in parts], offsets, nbytes)
                if item > 0:
                    expected[item] = (parts, offsets)
                refused += item < 0
                continue
            item = random.choice(list(expected))
            if action == 3:
                assert_parts(engine.load(item), *expected[item])
            elif action == 4:
                assert engine.settle(item)
            elif action == 5 and item not in reserved:
                engine.reserve(item)
                reserved.add(item)
            elif item in reserved:
                engine.unreserve(item)
                reserved.discard(item)
            else:
                engine.release(item)
                del expected[item]
        for item, (parts, offsets) in expected.items():
            assert_parts(engine.load(item), parts, offsets)
        engine.close()
    assert refused > 0


@pytest.mark.parametrize("transfers", ["best", "threads"])
def test_a_failed_write_loses_no_block(tmp_path, transfers):
    parts = [bytes_of(5000), bytes_of(30_000, 1), bytes_of(5000, 2), bytes_of(30_000, 3)]
    engine = Engine(str(tmp_path), capacity=1 << 20, threads=1, transfers=transfers)
    with file_size_limit(1 << 16):
        items = [engine.store([part.clone() for part in pair], [0, 8192], 40_000) for pair in (parts[:2], parts[2:])]
        assert [engine.settle(item) for item in items * 2] == [True, False] * 2
        for item, pair in zip(items * 2, (parts[:2], parts[2:]) * 2, strict=True):
            assert_parts(engine.load(item), pair, [0, 8192])
        assert engine.store([parts[0]], [0], 5000) == -1
    failure = engine.take_failure()
    assert failure.startswith("writing ")
    assert failure.endswith(f" of the spill file in {tmp_path}: File too large")
    assert engine.take_failure() == ""
