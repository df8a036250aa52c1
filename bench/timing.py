"""Clocks: how long one call of a provider takes, on the CPU and on a GPU."""

import statistics
import time
from collections.abc import Callable

import torch

import pykern
from pykern.offload.bandwidth import Bandwidth
from pykern.offload.cuda_device import CudaDevice
from pykern.offload.simulated import SimulatedDevice
from pykern.offload.streams import StreamDevice

Call = Callable[[], object]

# A sample of quick calls covers several of them, so that the clock's own cost does not count.
CPU_SAMPLE_SECONDS = 2e-3

# Calls this quick are made once untimed before each sample: what ran before left the caches and the threads as it needs
# them, and would be charged to whoever comes after it in the list of providers.
CPU_LEAD_IN_SECONDS = 0.1


class CpuClock:
    """Wall time of a call on this thread, after one of its own."""

    how = "wall clock"

    def __init__(self, call: Call):
        self.call = call
        call()
        begin = time.perf_counter()
        call()
        seconds = max(time.perf_counter() - begin, 1e-7)
        self.calls = max(1, int(CPU_SAMPLE_SECONDS / seconds))
        self.lead_in = seconds < CPU_LEAD_IN_SECONDS

    def sample(self) -> float:
        if self.lead_in:
            self.call()
        begin = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        return (time.perf_counter() - begin) / self.calls


class CudaClock:
    """Time between two events on the GPU, with nothing of the last call left in its L2 cache.

    The call is replayed from a CUDA graph, without the gaps that launches from Python leave; what cannot be captured
    (it synchronises with the host) is called as it is, and `how` says so. `captures`: False calls everything as it is.
    """

    _flush: torch.Tensor | None = None

    def __init__(self, call: Call, captures: bool = True):
        # The flush also takes long enough for the host to have queued the call behind it.
        if CudaClock._flush is None:
            CudaClock._flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        self.call = call
        self.run, self.how, self._graph = call, "events", None
        if captures:
            self._capture()
        self.run()
        torch.cuda.synchronize()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.run()
        except RuntimeError:
            torch.cuda.synchronize()
        else:
            self.run, self.how, self._graph = graph.replay, "graph", graph

    def sample(self) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        CudaClock._flush.zero_()
        begin.record()
        self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def clock(device: torch.device, call: Call, captures: bool = True) -> CpuClock | CudaClock:
    return CudaClock(call, captures) if device.type == "cuda" else CpuClock(call)


# --- what the machine can do ----------------------------------------------------------------------


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy."""
    cuda = device.type == "cuda"
    source = torch.ones(1 << (30 if cuda else 26), device=device)
    target = torch.empty_like(source)
    copy = clock(device, lambda: target.copy_(source))
    return 2 * source.nbytes / min(copy.sample() for _ in range(10 if cuda else 5))


def stream_device(device: torch.device) -> StreamDevice:
    """What activations are copied by: of a GPU its streams, of a CPU those of a simulated device, in its memory."""
    return CudaDevice(device) if device.type == "cuda" else SimulatedDevice()


def link_rates(device: torch.device) -> list[Bandwidth]:
    """Of copies between the device and the host's memory, of every kind and of several sizes."""
    if device.type == "cuda":
        return pykern.measure_bandwidth(device)
    return pykern.measure_bandwidth(stream_device(device), [1 << 20, 1 << 24])


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second: of the vendor's product on a GPU, of pykern's own micro-kernels in cache on a CPU."""
    if device.type == "cuda":
        size = 8192
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = clock(device, lambda: left @ right)
        return 2 * size**3 / statistics.median(product.sample() for _ in range(10))
    bfloat16 = dtype == torch.bfloat16
    torch.ops.pykern.matmul_in_cache.default(bfloat16, 50)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        operations = torch.ops.pykern.matmul_in_cache.default(bfloat16, 400)
        best = max(best, operations / (time.perf_counter() - begin))
    return best
