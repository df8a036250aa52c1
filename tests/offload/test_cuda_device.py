"""The CUDA device without one: which calls of torch.cuda it makes, in which order; and bandwidth, measured."""

import contextlib
import os
import re
from types import SimpleNamespace

import pytest
import torch

from pykern.offload import cuda_device, near
from pykern.offload.bandwidth import Bandwidth, _seconds_of_both, measure_bandwidth
from pykern.offload.cuda_device import CudaDevice
from pykern.offload.engine import Engine
from pykern.offload.simulated import SimulatedDevice
from pykern.offload.streamed import StreamedEngine


class FakeCuda:
    """torch.cuda as far as the device uses it. Work is done at once, and each call is noted."""

    def __init__(self):
        self.calls = []
        self.compute = FakeStream(self, "compute")
        self.current = self.compute
        self.streams = 0
        self.register_error = 0
        self.registered = set()
        self.selected = None
        self.capturing = False

    def is_available(self):
        return True

    def current_device(self):
        return 3

    def Stream(self, device):
        self.streams += 1
        return FakeStream(self, ("out", "back")[(self.streams - 1) % 2])

    def Event(self, enable_timing=False):
        return FakeEvent(self, enable_timing)

    def current_stream(self, device):
        return self.current

    def is_current_stream_capturing(self):
        return self.capturing

    def get_device_properties(self, device):
        return SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=2)

    @contextlib.contextmanager
    def device(self, device):
        self.selected = device
        yield
        self.selected = None

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def cudart(self):
        return self

    def cudaHostRegister(self, address, nbytes, flags):
        assert self.selected is not None and flags == 0
        self.calls.append(f"register {nbytes}")
        if not self.register_error:
            self.registered.add(address)
        return self.register_error

    def cudaHostUnregister(self, address):
        assert self.selected is not None
        self.registered.remove(address)
        return 0


class FakeStream:
    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def wait_event(self, event):
        self.owner.calls.append(f"{self.name} waits for {event.place}")


class FakeEvent:
    complete = True

    def __init__(self, owner, timing):
        self.owner, self.timing = owner, timing

    def record(self, stream):
        self.place = f"{stream.name} {len(self.owner.calls)}"
        self.owner.calls.append(f"record {stream.name}" + " timed" * self.timing)

    def query(self):
        return self.complete or self.timing

    def synchronize(self):
        self.owner.calls.append(f"synchronize {self.place}")

    def elapsed_time(self, other):
        return 250.0


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda_device, "cuda", fake)

    def record_stream(tensor, stream):
        fake.calls.append(f"{tensor.numel()} freed in {stream.name}")

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    return fake


class OnCpu(CudaDevice):
    """Tensors that a GPU would have are the CPU's."""

    def __init__(self, fake, directions=2):
        super().__init__("cuda:0", directions)
        self.fake, self.device = fake, torch.device("cpu")

    def copy(self, stream, target, source):
        with contextlib.ExitStack() as stack:
            original = torch.Tensor.copy_

            def copy_(target, source, non_blocking=False):
                self.fake.calls.append(f"copy {source.numel()} on {self.fake.current.name}" + " late" * non_blocking)
                return original(target, source)

            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(torch.Tensor, "copy_", copy_)
            super().copy(stream, target, source)


def test_the_device_meant(fake):
    assert CudaDevice("cuda:1").name == "cuda:1"
    device = CudaDevice()
    assert (device.name, device.device.index) == ("cuda:3", 3)
    assert not device.accepts(torch.zeros(3))
    assert CudaDevice(directions=1).out_stream is not None
    with pytest.raises(ValueError, match="device: expected a CUDA device for storage='pinned', got cpu"):
        CudaDevice("cpu")
    with pytest.raises(ValueError, match="directions: expected 1 or 2, got 3"):
        CudaDevice(directions=3)


def test_the_calls_of_an_item(fake):
    """Parts, event, wait, copy, event; and back. The computing stream is asked while it is the current one."""
    engine = StreamedEngine(OnCpu(fake), slot_bytes=[5000])
    source = torch.arange(5000).to(torch.uint8)
    item = engine.store([source], [0], 5000)
    engine.settle(item)
    block = engine.load(item)
    assert torch.equal(block, source)
    assert fake.calls == [
        "register 8192",
        "record compute", "out waits for compute 1", "copy 5000 on out late", "record out",
        "compute waits for out 4", "5000 freed in compute",
        "record compute", "back waits for compute 7", "back waits for out 4", "copy 5000 on back late", "record back",
        "compute waits for back 11",
    ]  # fmt: skip
    del fake.calls[:]
    engine.release(item)
    second = engine.store([source], [0], 5000)
    assert fake.calls[:5] == [
        "5000 freed in compute",
        "record compute",
        "out waits for compute 1",
        "out waits for back 11",
        "copy 5000 on out late",
    ]
    engine.release(second)
    assert len(fake.registered) == 1
    engine.close()
    assert not fake.registered


def test_copies_in_turn_share_a_stream(fake):
    device = OnCpu(fake, directions=1)
    assert device.back_stream is device.out_stream


def test_a_wait_that_stalls_is_timed(fake, monkeypatch):
    monkeypatch.setattr(FakeEvent, "complete", False)
    device = OnCpu(fake)
    event = device.record(device.out_stream)
    device.wait(device.compute_stream(), event)
    assert fake.calls == ["record out", "compute waits for out 0"]
    device.wait(device.compute_stream(), event, measured=True)
    assert fake.calls[2:] == ["record compute timed", "compute waits for out 0", "record compute timed"]
    assert device.stall_seconds() == 0.25
    assert device.stall_seconds() == 0.25
    for _ in range(1000):
        device.wait(device.compute_stream(), event, measured=True)
    assert len(device._waits) < 300


def test_memory_that_cannot_be_registered_is_pinned_by_torch(fake, monkeypatch):
    fake.register_error = 2
    asked = []
    empty = torch.empty

    def fake_empty(*arguments, pin_memory=False, **keywords):
        asked.append((pin_memory, keywords["device"]))
        return empty(*arguments, **keywords)

    monkeypatch.setattr(torch, "empty", fake_empty)
    device = OnCpu(fake)
    memory = device.allocate_host(8192)
    assert memory.numel() == 8192 and asked == [(True, "cpu")]
    device.free_host(memory)


def test_no_pinned_memory_at_all(fake, monkeypatch):
    fake.register_error = 2

    def refuse(*arguments, **keywords):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    # Whoever asks CUDA next would get the error of the call that failed.
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(
        MemoryError, match="slot_bytes: no pinned memory for 8192 bytes on the host: CUDA error: out of"
    ):
        StreamedEngine(OnCpu(fake), slot_bytes=[5000])


def test_nothing_is_captured_in_a_graph(fake):
    """What dies meanwhile is seen to after the capture: no event may be asked for during it."""
    engine = StreamedEngine(OnCpu(fake), slot_bytes=[5000, 5000])
    source = torch.arange(5000).to(torch.uint8)
    items = [engine.store([source], [0], 5000) for _ in range(2)]
    fake.capturing = True
    del fake.calls[:]
    for use in (lambda: engine.store([source], [0], 5000), lambda: engine.load(items[0]), engine.synchronize):
        with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph, whose .*; capture the step"):
            use()
    engine.release(items[0])
    assert engine.counters()["slots"] == 2 and fake.calls == []
    fake.capturing = False
    assert torch.equal(engine.load(items[1]), source)
    with pytest.raises(RuntimeError, match="released before its use"):
        engine.load(items[0])
    engine.close()


def test_memory_is_had_near_the_device(fake, monkeypatch, tmp_path):
    here = os.sched_getaffinity(0)
    monkeypatch.setattr(near, "_DEVICES", tmp_path)
    (tmp_path / "0000:1b:02.0").mkdir()
    (tmp_path / "0000:1b:02.0" / "local_cpulist").write_text(f"{min(here)},1000000-1000002\n")
    ran_on = []
    register = FakeCuda.cudaHostRegister

    def note(*arguments):
        ran_on.append(os.sched_getaffinity(0))
        return register(*arguments)

    monkeypatch.setattr(FakeCuda, "cudaHostRegister", note)
    device = OnCpu(fake)
    memory = device.allocate_host(4096)
    assert ran_on == [{min(here)}] and os.sched_getaffinity(0) == here
    device.free_host(memory)


@pytest.mark.parametrize("told", [None, "", "1000000-1000002"])
def test_processors_that_are_not_told_or_not_ours_change_nothing(fake, monkeypatch, tmp_path, told):
    monkeypatch.setattr(near, "_DEVICES", tmp_path)
    if told is not None:
        (tmp_path / "0000:1b:02.0").mkdir()
        (tmp_path / "0000:1b:02.0" / "local_cpulist").write_text(told)
    here = os.sched_getaffinity(0)
    with near.running_on(near.cpus_near(fake.get_device_properties(None))):
        assert os.sched_getaffinity(0) == here


def test_a_system_that_moves_no_threads_changes_nothing(monkeypatch):
    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with near.running_on(frozenset(os.sched_getaffinity(0))):
        pass


def test_parts_are_packed_on_the_device(fake):
    device = OnCpu(fake)
    parts = [torch.full((size,), size, dtype=torch.uint8) for size in (100, 30)]
    block = torch.zeros(512, dtype=torch.uint8)
    device.pack(parts, [0, 256], block)
    assert torch.equal(block[:100], parts[0]) and torch.equal(block[256:286], parts[1])


# --- bandwidth --------------------------------------------------------------------------------------------------------


def test_the_bandwidth_of_a_device_is_measured():
    # Slow enough that a busy machine hardly adds to it.
    rate = 15e6
    (apart,) = measure_bandwidth(SimulatedDevice(bandwidth=rate), [1 << 19])
    assert (apart.memory, apart.nbytes, apart.directions) == ("host", 1 << 19, 2)
    (in_turns,) = measure_bandwidth(SimulatedDevice(bandwidth=rate, directions=1), [1 << 19])
    assert in_turns.directions == 1
    for measured in (apart, in_turns):
        for value in measured.rates:
            assert 0.4 * rate < value < 1.05 * rate


def test_the_bandwidth_of_the_cpu_engine(tmp_path):
    measured = measure_bandwidth("cpu", [1 << 12, 1 << 20], path=tmp_path)
    assert [(one.memory, one.nbytes) for one in measured] == [
        ("memory", 1 << 12), ("memory", 1 << 20), ("file", 1 << 12), ("file", 1 << 20),
    ]  # fmt: skip
    assert all(value > 1e4 for one in measured for value in one[2:])


def test_the_bandwidth_of_every_kind_of_memory(fake, monkeypatch):
    from pykern.offload import bandwidth

    monkeypatch.setattr(bandwidth, "CudaDevice", lambda device: OnCpu(fake))
    monkeypatch.setattr(
        bandwidth, "_torch_memory", lambda pinned: lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8)
    )
    measured = measure_bandwidth("cuda", [4096])
    assert [one.memory for one in measured] == ["registered", "pinned", "pageable"]
    assert not fake.registered


def test_a_measurement_that_finds_no_room_gives_back_what_it_had():
    device = SimulatedDevice(host_bytes=3 * 4096)
    with pytest.raises(MemoryError, match="no memory for 8192 bytes on the host, which has 4096"):
        measure_bandwidth(device, [8192])
    assert [one.nbytes for one in measure_bandwidth(device, [4096])] == [4096]
    assert measure_bandwidth(device, []) == []


def test_an_engine_without_room_for_both_blocks_says_so():
    engine = Engine(capacity=1 << 16)
    assert engine.measure(1 << 16).out > 0
    with pytest.raises(MemoryError, match="nbytes: no room to measure with 65536 bytes: the storage is full; pass"):
        _seconds_of_both(engine, 1 << 16)


@pytest.mark.parametrize(
    ("beside", "directions", "rates"), [((9.0, 8.0), 2, (9.0, 8.0)), ((5.0, 5.0), 1, (10.0, 10.0))]
)
def test_whether_directions_are_better_at_once(beside, directions, rates):
    measured = Bandwidth("host", 1, 10.0, 10.0, *beside)
    assert (measured.directions, measured.rates) == (directions, rates)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([0], ValueError, "sizes: expected at least 1 byte, got 0"),
        ([1.0], TypeError, "sizes: expected integers, got float"),
    ],
)
def test_refused_sizes(sizes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        measure_bandwidth("cpu", sizes)
