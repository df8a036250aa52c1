"""Peak resident memory and time of pipeline schedules with and without offload, in processes that talk over gloo.

    python -m bench.offload.pipeline_memory [--json FILE] [--path FOLDER]

Each schedule runs in processes of its own, one rank each with one thread; the first rank, which holds the most, is
reported. Stages are MLPs that save about 40 MB for the backward of one microbatch. Peaks are those of a step, beyond
what model, gradients and batch take; buffers that the first step leaves count. Freed memory returns to the
system (MALLOC_MMAP_THRESHOLD_), so that what is measured is what is in use. All but PyTorch's own schedule let go of
what was sent once it has arrived, and make receive buffers when they are needed.

"modelled link" is a device whose copies take as long as a link would of which k is 0.9: a block's way out and back
takes 0.9 of the time in which one block is computed. The host's memory for it is the same process's, so only its time
counts.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.offload.peak_memory import digest
from bench.processes import peak_bytes, run_alone, write

DEVICES, CHUNKS, MICROBATCHES = 2, 4, 12
ROWS, WIDTH, LAYERS = 4096, 256, 5
# A layer saves its input and the activation's.
BLOCK_BYTES = 2 * LAYERS * ROWS * WIDTH * 4
K = 0.9

TORCH, INTERLEAVED, GIS, PO = "interleaved 1F1B, PyTorch", "interleaved 1F1B", "GIS", "PO"
PO_H_FILE, PO_F_FILE, PO_F_LINK = "PO-H, file", "PO-F, file", "PO-F, modelled link"
PROVIDERS = (TORCH, INTERLEAVED, GIS, PO, PO_H_FILE, PO_F_FILE, PO_F_LINK)
OFFLOAD = {PO_H_FILE: "half", PO_F_FILE: "full", PO_F_LINK: "full"}
NAMES = {INTERLEAVED: "1f1b_interleaved", GIS: "gis", PO: "po"}


def stage_module(index: int):
    import torch
    from torch import nn

    torch.manual_seed(index)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(*layers)


def loss_of(output, target):
    return (output - target).square().mean()


def make_schedule(provider: str, stages: list, path: str | None, block_seconds: float | None):
    from torch.distributed.pipelining import ScheduleInterleaved1F1B

    import pykern

    if provider == TORCH:
        return ScheduleInterleaved1F1B(stages, MICROBATCHES, loss_of)
    if provider in NAMES:
        return pykern.SchedulePipeOffload(
            stages, MICROBATCHES, loss_of, schedule=NAMES[provider], offload="none", times=(1.0, 1.0, 1.0),
            block_bytes=BLOCK_BYTES, bandwidth=1.0,
        )  # fmt: skip
    if provider == PO_F_LINK:
        from pykern.offload.simulated import SimulatedDevice

        bandwidth = 2 * BLOCK_BYTES / (K * block_seconds)
        return pykern.SchedulePipeOffload(
            stages, MICROBATCHES, loss_of, offload="full", storage="pinned", bandwidth=bandwidth,
            device=SimulatedDevice(bandwidth=bandwidth, directions=1),
        )  # fmt: skip
    return pykern.SchedulePipeOffload(
        stages, MICROBATCHES, loss_of, offload=OFFLOAD[provider], storage="file", path=path
    )


def forget_peak() -> None:
    """Peaks count from here on, where the system allows it."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def planned_blocks(schedule, rank: int) -> int:
    from pykern.offload.planning.orders import make_order
    from pykern.offload.planning.simulation import live_blocks

    if hasattr(schedule, "offload"):
        return schedule.offload.plan.peak_blocks[rank]
    return max(live_blocks(make_order(NAMES[INTERLEAVED], DEVICES, CHUNKS, MICROBATCHES), rank))


def work(rank: int, folder: str, provider: str, steps: int, path: str | None, block_seconds: float | None) -> None:
    """One rank; writes what it found to the folder."""
    import torch
    from torch import distributed
    from torch.distributed.pipelining import PipelineStage

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=DEVICES)
    count = DEVICES * CHUNKS
    indices = range(rank, count, DEVICES)
    stages = [PipelineStage(stage_module(index), index, count, torch.device("cpu")) for index in indices]
    schedule = make_schedule(provider, stages, path, block_seconds)
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(ROWS * MICROBATCHES, WIDTH, generator=generator) if rank in (0, DEVICES - 1) else None
    arguments = (batch,) if rank == 0 else ()
    keywords = {"target": batch} if rank == DEVICES - 1 else {}
    parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    distributed.barrier()
    before, seconds, peaks = resident_bytes(), [], []
    for _ in range(steps + 1):
        for stage in stages:
            stage.submod.zero_grad(set_to_none=False)
        distributed.barrier()
        forget_peak()
        begin = time.perf_counter()
        schedule.step(*arguments, return_outputs=False, **keywords)
        distributed.barrier()
        seconds.append(time.perf_counter() - begin)
        peaks.append(peak_bytes() - before)
    counters = schedule.offload.counters() if hasattr(schedule, "offload") else {}
    result = {
        "peak_bytes": statistics.median(peaks[1:]),
        # The first step makes buffers, and, with offload, measures for the plan.
        "seconds": statistics.median(seconds[1:]),
        "planned_blocks": planned_blocks(schedule, rank),
        "blocks": counters.get("peak_blocks"),
        "stall_seconds": (counters["stall_seconds"] + counters["engine"]["stall_seconds"]) / steps if counters else 0.0,
        "offloaded_bytes": counters["offloaded_bytes"] // steps if counters else 0,
        "notes": list(schedule.offload.plan.notes) if counters else [],
        "gradients": digest(parameters),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


def run(provider: str, steps: int, path: str | None, block_seconds: float | None) -> list[dict]:
    """What each rank found."""
    from torch import multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, provider, steps, path, block_seconds), nprocs=DEVICES)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(DEVICES)]


def measure(
    providers: tuple[str, ...] = PROVIDERS, path: str | None = None, steps: int = 2, report=lambda result: None
) -> list[dict]:
    """One result per provider, as the first rank found it."""
    found: list[dict] = []
    block_seconds = None
    for provider in providers:
        options = {"one": provider, "steps": steps, "path": path, "block-seconds": block_seconds}
        ranks = run_alone("bench.offload.pipeline_memory", options, mmap_threshold=1 << 16)
        if provider == PO:
            # What a rank needs for one block: it is busy for most of the step.
            block_seconds = ranks[0]["seconds"] / (CHUNKS * MICROBATCHES)
        measured = {"provider": provider, **ranks[0]}
        torchs = next((result for result in (*found, measured) if result["provider"] == TORCH), None)
        po = next((result for result in found if result["provider"] == PO), None)
        found.append(
            {
                **measured,
                "gradients": [rank["gradients"] for rank in ranks],
                "gradients_equal": not found or [rank["gradients"] for rank in ranks] == found[0]["gradients"],
                "peak_over_interleaved": None if torchs is None else ranks[0]["peak_bytes"] / torchs["peak_bytes"],
                "time_over_po": None if po is None else ranks[0]["seconds"] / po["seconds"],
            }
        )
        report(found[-1])
    return found


def line(result: dict) -> str:
    blocks = f"{result['planned_blocks']}" + ("" if result["blocks"] is None else f" planned, {result['blocks']} seen")
    share = result["peak_over_interleaved"]
    of_peak = "" if share is None else f"{100 * share:5.1f}% of PyTorch's interleaved 1F1B, "
    time_over = "" if result["time_over_po"] is None else f"{result['time_over_po']:5.2f}x PO's time, "
    return (
        f"offload/pipeline_memory  {result['provider']:<26} {result['peak_bytes'] / 1e6:7.1f} MB  "
        f"{of_peak}blocks: {blocks}, {result['seconds']:.2f} s, {time_over}stalls {result['stall_seconds']:.2f} s"
        + ("" if result["gradients_equal"] else "  GRADIENTS DIFFER")
    )


def table(results: list[dict]) -> str:
    """For README.md."""
    rows = ["| schedule | blocks | peak MB | of PyTorch's interleaved 1F1B | seconds | time over PO | gradients |"]
    rows.append("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for result in results:
        over = "" if result["time_over_po"] is None else f"{result['time_over_po']:.2f}"
        # The modelled link's host memory is in the same process.
        is_memory = result["provider"] != PO_F_LINK
        peak = f"{result['peak_bytes'] / 1e6:.0f}" if is_memory else ""
        share = result["peak_over_interleaved"]
        share = f"{100 * share:.0f} %" if is_memory and share is not None else ""
        rows.append(
            f"| {result['provider']} | {result['planned_blocks']} | {peak} | {share} | {result['seconds']:.2f} | "
            f"{over} | {'bit-equal' if result['gradients_equal'] else 'differ'} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.offload.pipeline_memory", description=__doc__)
    parser.add_argument("--path", help="folder of the spill files")
    parser.add_argument("--steps", type=int, default=2, help="training steps that count, after a first one")
    parser.add_argument("--provider", choices=PROVIDERS, action="append", help="all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--one", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--block-seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one, options.steps, options.path, options.block_seconds)))
        return 0
    providers = tuple(options.provider or PROVIDERS)
    results = measure(providers, options.path, options.steps, lambda result: print(line(result), flush=True))
    write(results, table(results), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
