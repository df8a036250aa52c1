"""Times the cases of bench/*/cases.py: every provider of a case on the same data, interleaved in one run."""

import importlib
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import pykern
from bench.timing import clock, copy_bandwidth, matrix_rate

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
    """

    family: str
    name: str
    shape: str
    make: Callable[[], dict[str, Callable[[], object]]]
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"

    @property
    def label(self) -> str:
        return f"{self.family}/{self.name}[{self.shape}]"


def load_cases(families: tuple[str, ...] = FAMILIES, device: str = "cpu") -> list[Case]:
    """All cases of the families, in their order; on a "cuda" device also those too large for a CPU."""
    return [case for family in families for case in importlib.import_module(f"bench.{family}.cases").cases(device)]


@dataclass(frozen=True)
class Limits:
    """Rates measured on this device in this run: operations per second by dtype, bytes per second."""

    flops: dict[str, float]
    bandwidth: float


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
    """Seconds of one call: 20th, 50th and 80th percentile, and this provider over pykern round by round."""

    provider: str
    p20: float
    p50: float
    p80: float
    ratio: float
    how: str


def time_case(case: Case, device: torch.device, seconds: float = 2.0) -> list[Timing]:
    """Runs all providers in turn until each has had about `seconds`, at least five rounds."""
    with torch.device(device):
        clocks = {name: clock(device, function) for name, function in case.make().items()}
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
        timings.append(Timing(name, low, middle, high, (measured / ours).median().item(), clocks[name].how))
    return timings


def time_listed(device: torch.device, family: str, label: str, seconds: float) -> list[Timing]:
    """`time_case` of the listed case with this label: what another process can be asked for."""
    (case,) = (case for case in load_cases((family,), device.type) if case.label == label)
    return time_case(case, device, seconds)


def floor_of(case: Case, limits: Limits) -> tuple[float, str]:
    """The seconds that no implementation can go below, and what sets them."""
    arithmetic = case.flops / limits.flops[case.dtype]
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
        }


def format_row(row: dict) -> str:
    limit = f"{row['percent_of_limit']:5.1f}% of {row['limit']}" if row["limit"] else ""
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


def run(cases: list[Case], seconds: float, device: torch.device = torch.device("cpu")) -> dict:
    """Prints each of these listed cases as it is timed and returns the whole record.

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
    for case in cases:
        print(f"{case.label}   p20 p50 p80, and time over pykern's")
        try:
            timings = run_alone(time_listed, device, case.family, case.label, seconds)
        except NotImplementedError as error:
            record["missing"][case.label] = str(error)
            print(f"  not run: {error}", flush=True)
            continue
        for row in rows(case, timings, limits):
            record["rows"].append(row)
            print(format_row(row), flush=True)
    return record


def write(record: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
