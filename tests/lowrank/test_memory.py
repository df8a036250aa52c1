"""What a step takes from the system beside its arguments."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, re, torch
from pykern.lowrank import ops

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

def step(n, length, rank, residual):
    matrix = torch.full((length, n), 0.5, dtype=torch.bfloat16).mT
    gradient, basis = torch.full_like(matrix, 0.25), torch.full((n, rank), 0.01, dtype=torch.bfloat16)
    moments = [torch.full((rank, length), 0.5) for _ in range(2)]
    arguments = [[matrix], [gradient], [basis], *([moment] for moment in moments), [torch.zeros(())]]
    arguments += [[torch.tensor(-1.0)] if residual else [], torch.tensor(0.01), None, None]
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    ops.low_rank_adamw_step(
        *arguments, beta1=0.9, beta2=0.99, eps=1e-8, corrected_eps=True, weight_decay=0.0, decay_after=False, scale=1.0,
        residual=residual, removed=1.0, growth=1.01, zero_norm_limits=False, amplitude=1.0, amplitude_first=False,
        orthonormal=True, maximize=False,
    )
    return (status("VmHWM") - before) / (matrix.numel() * matrix.element_size())

for rank, residual in CASES:
    # Each in a process of its own, which inherits no memory that an earlier step has given back.
    if os.fork() == 0:
        torch.set_num_threads(2)
        step(64, 64, 8, residual)
        print(rank, residual, step(4096, 4096, rank, residual), flush=True)
        os._exit(0)
    os.wait()
"""

CASES = [(32, 0), (128, 0), (512, 0), (128, 1), (512, 1), (512, 2), (512, 3)]
"""Rank and residual."""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="asks the kernel for the peak")
def test_a_step_needs_little_memory():
    done = subprocess.run(
        [sys.executable, "-c", f"CASES = {CASES}\n{PROGRAM}"],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    shares = [float(line.split()[2]) for line in done.stdout.splitlines()]
    # Fira's rounds share the low-rank gradient, rank / n of a bfloat16 weight; at rank 128 both fit into 5 %.
    limits = [0.05 + 512 / 4096 if case == (512, 1) else 0.05 for case in CASES]
    assert len(shares) == len(limits)
    # What the smallest rank needs may fit into pages that the process has already.
    assert all(0 <= share < limit for share, limit in zip(shares, limits, strict=True)), done.stdout
    assert sum(share > 0 for share in shares) > 4, done.stdout
