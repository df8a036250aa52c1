"""The storage behind the hooks: slots, files, queues, failures."""

import gc
import os
import re
import resource
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import pykern
from pykern.offload import engine as engine_module
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


def store(engine, tensor):
    """An item of one part."""
    return engine.store([tensor], [0], tensor.numel())


@pytest.fixture(params=STORAGES)
def engine(request, tmp_path):
    folder = str(tmp_path) if request.param == "file" else None
    return Engine(folder, capacity=8 << 20)


@pytest.mark.parametrize("size", [1, 63, 64, 4095, 4096, 4097, 100_000, (4 << 20) - 1, 4 << 20, (4 << 20) + 4097])
def test_bytes_come_back(engine, size):
    source = bytes_of(size)
    item = store(engine, source.clone())
    engine.synchronize()
    assert torch.equal(engine.load(item), source)
    assert engine.counters()["reloaded_bytes"] == size


def test_unaligned_source(engine):
    source = bytes_of(10_001)
    item = store(engine, source[1:])
    engine.synchronize()
    assert torch.equal(engine.load(item), source[1:])


def test_loads_share_a_buffer_while_one_is_alive(engine):
    item = store(engine, bytes_of(5000))
    engine.synchronize()
    first = engine.load(item)
    second = engine.load(item)
    assert first.data_ptr() == second.data_ptr()
    assert engine.counters()["reloads"] == 1
    del first, second
    engine.load(item)
    assert engine.counters()["reloads"] == 2


def test_reserved_bytes_wait(engine):
    item = store(engine, bytes_of(5000))
    engine.synchronize()
    engine.reserve(item)
    engine.synchronize()
    assert engine.counters()["reloads"] == 1
    for _ in range(3):
        assert torch.equal(engine.load(item), bytes_of(5000))
    assert engine.counters()["reloads"] == 1
    assert engine.counters()["stall_seconds"] == 0
    engine.unreserve(item)
    engine.load(item)
    assert engine.counters()["reloads"] == 2
    assert engine.counters()["stall_seconds"] > 0


def test_buffers_are_aligned_and_outlive_the_engine(engine):
    item = store(engine, bytes_of(5000))
    engine.synchronize()
    loaded = engine.load(item)
    assert loaded.data_ptr() % 4096 == 0
    engine.release(item)
    engine.close()
    assert torch.equal(loaded, bytes_of(5000))


def test_slots_are_counted_and_reused(engine):
    items = [store(engine, bytes_of(size)) for size in (5000, 10_000, 1)]
    engine.synchronize()
    granule = 4096 if engine.description.startswith("file") else 64
    used = sum(-(-size // granule) * granule for size in (5000, 10_000, 1))
    counters = engine.counters()
    assert (counters["slots"], counters["slot_bytes"]) == (3, used)
    for item in items:
        engine.release(item)
    counters = engine.counters()
    assert (counters["slots"], counters["slot_bytes"]) == (0, 0)
    assert (counters["peak_slots"], counters["peak_slot_bytes"]) == (3, used)
    engine.reset_counters()
    assert engine.counters()["peak_slots"] == 0


def test_freed_neighbours_merge(engine):
    """Holes left in any order make room for one large tensor again."""
    size = 1 << 20
    items = [store(engine, bytes_of(size)) for _ in range(8)]
    assert store(engine, bytes_of(1)) == -1
    for index in (1, 5, 3, 4, 2, 0, 7, 6):
        engine.release(items[index])
    engine.synchronize()
    large = bytes_of(8 << 20, seed=1)
    item = store(engine, large)
    assert item > 0
    engine.synchronize()
    assert torch.equal(engine.load(item), large)


def test_released_items_are_gone(engine):
    item = store(engine, bytes_of(100))
    engine.release(item)
    engine.release(item)
    with pytest.raises(RuntimeError, match="released before its use"):
        engine.load(item)
    other = store(engine, bytes_of(100, seed=1))
    assert other != item
    with pytest.raises(RuntimeError, match="released before its use"):
        engine.load(item)


def test_closed_engine_says_so(engine):
    item = store(engine, bytes_of(100))
    engine.close()
    with pytest.raises(RuntimeError, match="closed before its saved tensors were used"):
        engine.load(item)
    engine.release(item)


def test_a_write_in_flight_is_forwarded():
    offload = pykern.ActivationOffload("file", min_bytes=0, keep_last=0, threads=1, debug_delays=0)
    model, x = make("mlp")
    plain = gradients(model, x)
    # Whether a write is still in flight when its tensor is needed is up to the scheduler; it is soon.
    for _ in range(50):
        assert_bit_equal(gradients(model, x, offload), plain)
        offload.synchronize()
        stats = offload.stats()
        if stats["forwards"] > 0:
            break
    assert stats["forwards"] > 0
    assert stats["forwarded_bytes"] >= stats["forwards"]


def test_queue_bounds_what_is_in_flight():
    """With room for one tensor the forward waits for each write; a tensor above the bound goes alone."""
    engine = Engine(threads=1, queue_bytes=1000, delay_seed=0)
    for size in (900, 900, 5000, 900):
        store(engine, bytes_of(size))
    assert engine.counters()["offloads"] >= 3
    assert engine.counters()["queue_seconds"] > 0


def test_loading_does_not_hold_the_interpreter():
    engine = Engine(threads=1, delay_seed=0)
    items = [store(engine, bytes_of(1000)) for _ in range(200)]
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    engine.synchronize()
    end = time.perf_counter()
    stop.set()
    ticker.join()
    assert items[-1] > 0
    assert sum(begin < moment < end for moment in ticks) > 5


def test_steady_state_needs_no_more_storage():
    for storage in STORAGES:
        model, x = make("transformer")
        offload = pykern.ActivationOffload(storage, min_bytes=0, keep_last=0)
        sizes = []
        for _ in range(6):
            gradients(model, x, offload)
            offload.synchronize()
            stats = offload.stats()
            assert stats["slots"] == 0
            sizes.append((stats["extent_bytes"], stats["peak_slots"], stats["peak_slot_bytes"]))
        assert sizes[1:] == sizes[:1] * 5


def test_exact_counters():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    x = torch.randn(128, 64)
    offload = pykern.ActivationOffload("memory", min_bytes=4096, keep_last=1)
    for step in (1, 2):
        with offload:
            y = x @ weight  # saves x
            z = y.sin()  # saves y
            loss = (z * z).sum() + y[0].exp().sum()  # saves z twice; a row of 256 bytes
        offload.synchronize()
        stats = offload.stats()
        assert (stats["offloads"], stats["offloaded_bytes"]) == (2 * step, 2 * 32768 * step)
        assert (stats["deduplicated"], stats["deduplicated_bytes"]) == (step, 32768 * step)
        assert stats["kept"] == {
            "parameter": 0, "small": step, "last": step, "capacity": 0, "skipped": 0, "unsupported": 0,
        }  # fmt: skip
        assert (stats["kept_bytes"]["small"], stats["kept_bytes"]["last"]) == (256 * step, 32768 * step)
        assert (stats["slots"], stats["slot_bytes"]) == (2, 2 * 32768)
        loss.backward()
        offload.synchronize()
        stats = offload.stats()
        # x and y come back once each; z never left.
        assert (stats["reloads"], stats["reloaded_bytes"]) == (2 * step, 2 * 32768 * step)
        assert (stats["forwards"], stats["slots"], stats["peak_slots"]) == (0, 0, 2)
    offload.reset_stats()
    stats = offload.stats()
    assert stats["offloads"] == stats["reloads"] == stats["deduplicated"] == stats["peak_slots"] == 0
    assert not any(stats["kept"].values())


def test_parameters_and_buffers_of_the_module_stay():
    model, x = make("convolution")
    model.register_buffer("constant", torch.randn(1))
    weight = model[4].weight

    def loss(model, x):
        # A detached view of a parameter can only be known by the module.
        return (model(x) * weight.detach().view(-1)[:1]).square().sum()

    kept = []
    for parameters in ((), model, [weight]):
        offload = pykern.ActivationOffload(min_bytes=8, keep_last=0, parameters=parameters)
        gradients(model, x, offload, loss=loss)
        kept.append(offload.stats()["kept"]["parameter"])
    assert kept[1] > kept[0]
    assert kept[2] > kept[0]


def test_frozen_parameters_and_views_of_them_stay():
    weight = torch.nn.Parameter(torch.randn(64, 64), requires_grad=False)
    x = torch.randn(16, 64, requires_grad=True)
    offload = pykern.ActivationOffload(min_bytes=0, keep_last=0)
    with offload:
        loss = (torch.nn.functional.linear(x, weight) @ weight.t() * weight[:16]).sum()
    stats = offload.stats()
    assert stats["kept"]["parameter"] == 3
    assert stats["offloads"] == stats["kept"]["last"] == 0
    loss.backward()


def test_skip_decides():
    model, x = make("mlp")
    seen = []
    offload = pykern.ActivationOffload(min_bytes=0, keep_last=0, skip=lambda tensor: seen.append(tensor) or True)
    plain = gradients(model, x)
    assert_bit_equal(gradients(model, x, offload), plain)
    stats = offload.stats()
    assert stats["offloads"] == 0
    assert stats["kept"]["skipped"] == len(seen) > 0


# --- files ------------------------------------------------------------------------------------------


def test_file_has_no_name(tmp_path):
    model, x = make("mlp")
    offload = pykern.ActivationOffload("file", min_bytes=0, path=tmp_path)
    assert list(tmp_path.iterdir()) == []
    gradients(model, x, offload)
    assert list(tmp_path.iterdir()) == []
    assert len(descriptors(tmp_path)) == 1
    offload.close()
    assert descriptors(tmp_path) == []


def test_file_goes_with_the_last_reference(tmp_path):
    model, x = make("mlp")
    offload = pykern.ActivationOffload("file", min_bytes=0, keep_last=0, path=tmp_path)
    plain = gradients(model, x)
    model.zero_grad()
    with offload:
        loss = loss_of(model, x)
    del offload
    gc.collect()
    assert len(descriptors(tmp_path)) == 1
    loss.backward()
    assert_bit_equal([p.grad for p in model.parameters()], plain)
    del loss
    gc.collect()
    assert descriptors(tmp_path) == []


def test_preallocated(tmp_path):
    offload = pykern.ActivationOffload("file", path=tmp_path, capacity=10_000_000)
    (descriptor,) = descriptors(tmp_path)
    status = os.stat(descriptor)
    assert status.st_size == offload.stats()["extent_bytes"] == -(-10_000_000 // 4096) * 4096
    assert status.st_blocks * 512 >= status.st_size


@pytest.mark.parametrize("storage", STORAGES)
def test_full_storage_keeps_tensors(storage):
    model, x = make("mlp")
    plain = gradients(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offload = pykern.ActivationOffload(storage, min_bytes=0, keep_last=0, capacity=100_000)
        for _ in range(2):
            assert_bit_equal(gradients(model, x, offload), plain)
    stats = offload.stats()
    assert stats["kept"]["capacity"] > 0
    # A copy that the backward asks for before it has been made is handed back, and never ends.
    assert stats["offloads"] + stats["forwards"] > 0
    assert stats["peak_slot_bytes"] <= stats["extent_bytes"] <= 102_400


def test_growth(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_module, "FILE_GROWTH", 1 << 16)
    model, x = make("mlp")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("file", min_bytes=0, keep_last=0, path=tmp_path)
    assert offload.stats()["extent_bytes"] == 1 << 16
    assert_bit_equal(gradients(model, x, offload), plain)
    stats = offload.stats()
    assert stats["extent_bytes"] > 1 << 16
    assert stats["extent_bytes"] % (1 << 16) == 0
    assert stats["kept"]["capacity"] == 0


def test_full_disk_is_told_before_training(tmp_path):
    capacity = 1 << 60
    with pytest.raises(OSError, match="No space left on device") as raised:
        pykern.ActivationOffload("file", path=tmp_path, capacity=capacity)
    message = str(raised.value)
    assert "\n" not in message
    assert all(part in message for part in (str(tmp_path), str(capacity), "bytes are free in", "capacity=", "path="))
    assert descriptors(tmp_path) == []


def test_folder_that_takes_no_file():
    with pytest.raises(OSError, match=r"path: cannot create a file in /proc: .*; pass path= a folder"):
        pykern.ActivationOffload("file", path="/proc")


def test_file_size_limit_is_told_before_training(tmp_path):
    with (
        file_size_limit(1 << 20),
        pytest.raises(OSError, match="cannot preallocate 16777216 bytes of .*: File too large"),
    ):
        pykern.ActivationOffload("file", path=tmp_path, capacity=1 << 24)


def test_failed_growth_loses_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_module, "FILE_GROWTH", 1 << 16)
    model, x = make("mlp")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("file", min_bytes=0, keep_last=0, path=tmp_path)
    with file_size_limit(1 << 16), pytest.warns(RuntimeWarning) as warned:
        for _ in range(3):
            assert_bit_equal(gradients(model, x, offload), plain)
    stats = offload.stats()
    assert stats["kept"]["capacity"] > 0
    assert stats["offloads"] + stats["forwards"] > 0
    (warning,) = warned
    assert re.search(
        r"cannot preallocate \d+ bytes of the spill file in .*: File too large; activations that can't be moved stay",
        str(warning.message),
    )


def test_failed_writes_lose_nothing(tmp_path):
    model, x = make("mlp")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("file", min_bytes=0, keep_last=0, path=tmp_path, capacity=1 << 20)
    with file_size_limit(1 << 14), pytest.warns(RuntimeWarning) as warned:
        for _ in range(3):
            model.zero_grad()
            with offload:
                loss = loss_of(model, x)
            offload.synchronize()
            loss.backward()
            assert_bit_equal([parameter.grad for parameter in model.parameters()], plain)
    assert offload.stats()["kept"]["capacity"] > 0
    (warning,) = warned
    assert re.search(
        r"writing \d+ bytes at \d+ of the spill file in .*: File too large; activations that can't be moved stay",
        str(warning.message),
    )


def test_failed_read_is_one_clear_error(tmp_path):
    model, x = make("mlp")
    offload = pykern.ActivationOffload("file", min_bytes=0, keep_last=0, path=tmp_path, capacity=1 << 20)
    with offload:
        loss = loss_of(model, x)
    offload.synchronize()
    (descriptor,) = descriptors(tmp_path)
    os.truncate(descriptor, 0)
    with pytest.raises(RuntimeError, match=r"reading \d+ bytes at \d+ of the spill file in .*: the file ends there"):
        loss.backward()


# --- threads and processes --------------------------------------------------------------------------


def test_threads_that_the_system_refuses(tmp_path):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20), limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"threads: the system gives \d+ of 1000: .*; ask for fewer"):
            Engine(str(tmp_path), capacity=1 << 20, threads=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert descriptors(tmp_path) == []


def test_released_while_it_is_waited_for():
    """Behind a long read, another thread waits for an item that is released."""
    engine = Engine(threads=1, link=Link(latency=0.1, directions=1))
    first, second = store(engine, bytes_of(10)), store(engine, bytes_of(10))
    engine.synchronize()
    engine.reserve(first)
    errors = []

    def load():
        try:
            engine.load(second)
        except RuntimeError as error:
            errors.append(str(error))

    loading = threading.Thread(target=load)
    loading.start()
    time.sleep(0.02)
    engine.release(second)
    loading.join()
    assert errors == ["offload: the saved tensor was released before its use"]


def test_a_fork_and_an_exit_with_activations_in_flight():
    """A child ends, and is told that it has no threads; its parent goes on, and ends while writes are queued."""
    code = """
import gc, os, sys, tempfile
import pykern
from tests.offload.support import assert_bit_equal, gradients, loss_of, make
model, x = make("mlp")
plain = gradients(model, x)
offload = pykern.ActivationOffload("memory", min_bytes=0, keep_last=0)
model.zero_grad()
with offload:
    loss = loss_of(model, x)
offload.synchronize()
if os.fork() == 0:
    try:
        loss.backward()
    except RuntimeError as error:
        print(error)
    del offload, loss
    gc.collect()
    sys.exit(0)
_, status = os.wait()
assert status == 0, status
loss.backward()
assert_bit_equal([parameter.grad for parameter in model.parameters()], plain)
file = pykern.ActivationOffload("file", min_bytes=0, keep_last=0, path=tempfile.mkdtemp(), debug_delays=0)
with file:
    loss = loss_of(model, x)
print("end")
"""
    told, end = in_a_process(code).splitlines()
    assert told.startswith("offload: opened before a fork, which copies no threads")
    assert end == "end"
