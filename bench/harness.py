"""Times the cases of bench/*/cases.py: every provider of a case on the same data, interleaved in one run."""

import gc
import importlib
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import pykern
from bench.timing import CpuClock, CudaClock, clock, copy_bandwidth, link_rates, matrix_rate
from pykern.offload.bandwidth import Bandwidth
from pykern.train.memory import PeakMemory

FAMILIES = ("attention", "policy", "lowrank", "offload")
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    make: returns {provider: function to time}, all on the same data; the first provider is pykern. It is called once,
        with the bench's device as the default of torch's factories, and what it allocates is freed before the next
        case.
    flops, bytes: what the op must do and move at least, for the rates and the share of the binding limit.
    dtype: "float32" or "bfloat16", the unit that bounds the arithmetic.
    link: None if `bytes` are those of the device's own memory; "out" or "back", over the link to the host's.
    is_step: a step of training, which a GPU's clock calls as a trainer does, never from a CUDA graph; what it takes of
        memory is measured too.
    """

    family: str
    name: str
    shape: str
    make: Callable[[], dict[str, Callable[[], object]]]
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"
    link: str | None = None
    is_step: bool = False

    @property
    def label(self) -> str:
        return f"{self.family}/{self.name}[{self.shape}]"


def load_cases(families: tuple[str, ...] = FAMILIES, device: str = "cpu") -> list[Case]:
    """All cases of the families, in their order; on a "cuda" device also those too large for a CPU."""
    return [case for family in families for case in importlib.import_module(f"bench.{family}.cases").cases(device)]


@dataclass(frozen=True)
class Limits:
    """Rates measured on this device in this run: operations per second by dtype, bytes per second.

    links: copies "out" to the host's memory and "back".
    """

    flops: dict[str, float]
    bandwidth: float
    links: dict[str, float] = field(default_factory=dict)


# What one was seen to do: a large copy, and an 8192 x 8192 x 8192 product on random data; float32 as the maker says.
KNOWN_LIMITS = {"NVIDIA H200": Limits({"float32": 67e12, "bfloat16": 790e12}, 4.3e12)}


def run_alone(function: Callable, device: torch.device, *arguments):
    """function(device, *arguments), on the CPU in a process of its own.

    What a process allocated before decides how the C library serves the next large block, from memory that it kept or
    from pages that the kernel clears anew: a factor of two for a step with temporaries as large as the weight. In a new
    process no case depends on those before it. A GPU's memory comes from PyTorch's cache either way.
    """
    if device.type == "cuda":
        return function(device, *arguments)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pykern", __name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, device, *arguments).result()


def measure_limits(device: torch.device) -> Limits:
    rates = {name: matrix_rate(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    return Limits(rates, copy_bandwidth(device))


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: 20th, 50th and 80th percentile, and this provider over pykern round by round.

    peak_bytes: of a step, what it took at most beyond what was there before it.
    """

    provider: str
    p20: float
    p50: float
    p80: float
    ratio: float
    how: str
    peak_bytes: int | None = None


def start_clocks(case: Case, device: torch.device, failures: dict[str, str]) -> dict[str, CpuClock | CudaClock]:
    """Of every provider that runs here. What fails of the others is told, and costs their own figures alone."""
    clocks = {}
    with torch.device(device):
        for name, function in case.make().items():
            try:
                clocks[name] = clock(device, function, captures=not case.is_step)
            except Exception as error:
                if not clocks:
                    raise
                reason = next(iter(str(error).strip().splitlines()), "")
                failures[name] = f"{type(error).__name__}: {reason}"
                print(f"  {name} not run: {failures[name]}", flush=True)
    return clocks


def peak_of(watch: CpuClock | CudaClock, device: torch.device) -> int:
    with PeakMemory(device, trim=True) as memory:
        watch.call()
    return memory.peak - memory.before


def time_case(
    case: Case, device: torch.device, seconds: float = 2.0, failures: dict[str, str] | None = None
) -> list[Timing]:
    """Runs all providers in turn until each has had about `seconds`, at least five rounds.

    failures: gets the reason of each provider but the first that does not run.
    """
    clocks = start_clocks(case, device, {} if failures is None else failures)
    peaks = {name: peak_of(watch, device) for name, watch in clocks.items()} if case.is_step else {}
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    deadline = time.perf_counter() + seconds * len(clocks)
    rounds = 0
    while rounds < 5 or (rounds < 200 and time.perf_counter() < deadline):
        for name, watch in clocks.items():
            samples[name].append(watch.sample())
        rounds += 1
    ours = torch.tensor(next(iter(samples.values())), dtype=torch.float64)
    timings = []
    for name, values in samples.items():
        measured = torch.tensor(values, dtype=torch.float64)
        low, middle, high = torch.quantile(measured, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        ratio = (measured / ours).median().item()
        timings.append(Timing(name, low, middle, high, ratio, clocks[name].how, peaks.get(name)))
    return timings


def time_listed(device: torch.device, family: str, label: str, seconds: float) -> tuple[list[Timing], dict[str, str]]:
    """`time_case` of the listed case with this label, and its failures: what another process can be asked for."""
    (case,) = (case for case in load_cases((family,), device.type) if case.label == label)
    failures: dict[str, str] = {}
    return time_case(case, device, seconds, failures), failures


def floor_of(case: Case, limits: Limits) -> tuple[float, str]:
    """The seconds that no implementation can go below, and what sets them."""
    arithmetic = case.flops / limits.flops[case.dtype]
    if case.link is not None:
        return (case.bytes / limits.links[case.link] if limits.links else 0.0), f"link {case.link}"
    memory = case.bytes / limits.bandwidth
    return max((arithmetic, "arithmetic"), (memory, "memory"))


def print_floors(cases: list[Case], limits: Limits) -> None:
    for case in cases:
        floor, binding = floor_of(case, limits)
        print(f"{case.label:<90} {floor * 1e3:10.4f} ms by {binding}" if floor else f"{case.label:<90} no floor given")


def rows(case: Case, timings: list[Timing], limits: Limits) -> Iterator[dict]:
    """One flat record per provider, as printed and as written to JSON."""
    floor, binding = floor_of(case, limits)
    for timing in timings:
        yield {
            "family": case.family,
            "name": case.name,
            "shape": case.shape,
            "dtype": case.dtype,
            "provider": timing.provider,
            "ms_p20": timing.p20 * 1e3,
            "ms_p50": timing.p50 * 1e3,
            "ms_p80": timing.p80 * 1e3,
            "tflops": case.flops / timing.p50 / 1e12,
            "gb_per_s": case.bytes / timing.p50 / 1e9,
            "limit": binding if floor else None,
            "percent_of_limit": 100 * floor / timing.p50 if floor else None,
            "time_over_pykern": timing.ratio,
            "timed_by": timing.how,
            **({} if timing.peak_bytes is None else {"peak_bytes": timing.peak_bytes}),
        }


def format_row(row: dict) -> str:
    limit = f"{row['percent_of_limit']:5.1f}% of {row['limit']}" if row["limit"] else ""
    if "peak_bytes" in row:
        limit += f"  {row['peak_bytes'] / 1e9:.3f} GB at most"
    return (
        f"  {row['provider']:<28} {row['ms_p20']:10.3f} {row['ms_p50']:10.3f} {row['ms_p80']:10.3f} ms "
        f"{row['tflops']:8.3f} TFLOP/s {row['gb_per_s']:8.2f} GB/s  {row['time_over_pykern']:6.2f}x  {limit}"
    )


def environment(device: torch.device) -> dict:
    """What a reader needs to judge the figures: versions, machine, commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        **pykern.info(),
        **{name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "device": device.type,
        "processor": processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run(
    cases: list[Case], seconds: float, device: torch.device = torch.device("cpu"), path: Path | None = None
) -> dict:
    """Prints each of these listed cases as it is timed and returns the whole record, which is in the file after each.

    A case whose op has no kernel on the device is printed and recorded with the reason, not left out.
    """
    limits = run_alone(measure_limits, device)
    record = {
        "environment": environment(device),
        "limits": {"flops": limits.flops, "bandwidth": limits.bandwidth},
        "rows": [],
        "missing": {},
    }
    print(
        f"limits here: {limits.flops['float32'] / 1e12:.3f} TFLOP/s float32, "
        f"{limits.flops['bfloat16'] / 1e12:.3f} TFLOP/s bfloat16, {limits.bandwidth / 1e9:.1f} GB/s copy"
    )
    if any(case.link for case in cases):
        measured = link_rates(device)
        limits = replace(limits, links=best_links(measured))
        record["limits"]["links"], record["links"] = limits.links, [one._asdict() for one in measured]
        print(*map(format_link, measured), sep="\n")
    for case in cases:
        # Of the case before, what holds itself.
        gc.collect()
        print(f"{case.label}   p20 p50 p80, and time over pykern's")
        try:
            timings, failures = run_alone(time_listed, device, case.family, case.label, seconds)
        except NotImplementedError as error:
            record["missing"][case.label] = str(error)
            print(f"  not run: {error}", flush=True)
            continue
        record["missing"].update({f"{case.label} {name}": reason for name, reason in failures.items()})
        for row in rows(case, timings, limits):
            record["rows"].append(row)
            print(format_row(row), flush=True)
        if path is not None:
            write(record, path)
    if path is not None:
        write(record, path)
    return record


def best_links(measured: list[Bandwidth]) -> dict[str, float]:
    """Of large blocks, one direction at a time."""
    largest = max(one.nbytes for one in measured)
    return {way: max(getattr(one, way) for one in measured if one.nbytes == largest) for way in ("out", "back")}


def format_link(one: Bandwidth) -> str:
    return (
        f"link to {one.memory:<10} {one.nbytes / 2**20:8.3f} MiB  out {one.out / 1e9:7.2f} GB/s, back "
        f"{one.back / 1e9:7.2f}; at once {one.out_beside_back / 1e9:7.2f} and {one.back_beside_out / 1e9:7.2f}"
    )


def write(record: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
