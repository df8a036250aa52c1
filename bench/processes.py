"""Measurements in processes of their own: the peak of resident memory is a property of a process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def peak_bytes() -> int:
    """Not getrusage's figure: that one a process inherits from whoever started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB", status, flags=re.MULTILINE)[1]) * 1024


def run_alone(module: str, arguments: dict[str, object], mmap_threshold: int | None = None):
    """What `python -m module --name value ...` prints as JSON; options that are None are left out.

    mmap_threshold: what is at least as large goes back to the system as soon as it is freed.
    """
    command = [sys.executable, "-m", module]
    for name, value in arguments.items():
        command += [] if value is None else [f"--{name}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if mmap_threshold is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(mmap_threshold)
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{finished.stderr}")
    return json.loads(finished.stdout)


def write(results: object, table: str, file: Path | None) -> None:
    """The record of measurements on the CPU, if a file is given."""
    if file is not None:
        import torch

        from bench import harness

        environment = harness.environment(torch.device("cpu"))
        harness.write({"environment": environment, "table": table, "results": results}, file)
