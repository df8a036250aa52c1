"""Peak resident memory of one training step with and without activation offload.

    python -m bench.offload.peak_memory [--model mlp|transformer] [--storage file] [--json FILE]

Each measurement is a process of its own, since the peak is a property of a process. Resident memory is that of the
process alone: the page cache, if a file system can't do direct I/O, does not count.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = ("mlp", "transformer")
BASELINE = "plain"


def build(name: str) -> tuple[Callable, list]:
    """A function that returns the loss, and the parameters."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "mlp":
        model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(24)))
        data = torch.randn(4096, 512)
    else:
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
        model = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        data = torch.randn(4, 512, 256)
    return lambda: model(data).square().mean(), list(model.parameters())


def peak_bytes() -> int:
    """Not getrusage's figure: that one a process inherits from whoever started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status, flags=re.MULTILINE)[1]) * 1024


def step(model: str, storage: str, path: str | None) -> dict:
    """Two training steps in this process: peak resident memory beyond that of the idle process, gradients' hash."""
    from contextlib import nullcontext

    import pykern

    loss, parameters = build(model)
    offload = None if storage == BASELINE else pykern.ActivationOffload(storage, path=path)
    before = peak_bytes()
    seconds = []
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        begin = time.perf_counter()
        with offload or nullcontext():
            loss().backward()
        seconds.append(time.perf_counter() - begin)
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.grad.numpy().tobytes())
    return {
        "storage": storage,
        "peak_bytes": peak_bytes() - before,
        "process_bytes": peak_bytes(),
        "seconds": seconds[-1],
        "gradients": digest.hexdigest(),
        "stats": offload.stats() if offload else None,
    }


def measure(model: str = "mlp", storages: tuple[str, ...] = (BASELINE, "file"), path: str | None = None) -> dict:
    """One process per storage, and what the offload saves against the first.

    Both run with a fixed mmap threshold, so that the allocator gives freed activations back instead of keeping them.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = []
    for storage in storages:
        command = [sys.executable, "-m", "bench.offload.peak_memory", "--model", model, "--one", storage]
        if path is not None:
            command += ["--path", path]
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(f"peak_memory: {storage} failed:\n{finished.stderr}")
        runs.append(json.loads(finished.stdout))
    plain = runs[0]
    for run in runs:
        run["of_plain"] = run["peak_bytes"] / plain["peak_bytes"]
        run["time_over_plain"] = run["seconds"] / plain["seconds"]
        run["gradients_equal"] = run["gradients"] == plain["gradients"]
    return {"model": model, "runs": runs}


def format_run(model: str, run: dict) -> str:
    equal = "gradients bit-equal" if run["gradients_equal"] else "GRADIENTS DIFFER"
    return (
        f"offload/peak_memory[{model}]  {run['storage']:<7} {run['peak_bytes'] / 1e6:8.1f} MB  "
        f"{100 * run['of_plain']:5.1f}% of plain  {run['time_over_plain']:5.2f}x time  {equal}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.offload.peak_memory", description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--storage", action="append", choices=("memory", "file"))
    parser.add_argument("--path", help="folder of the spill file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(step(options.model[0], options.one, options.path)))
        return 0
    record = []
    for model in options.model or MODELS:
        record.append(measure(model, (BASELINE, *(options.storage or ["file"])), options.path))
        for run in record[-1]["runs"]:
            print(format_run(model, run), flush=True)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
