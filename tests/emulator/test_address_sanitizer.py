"""Every CUDA kernel under AddressSanitizer and UBSan, in a process that has their runtime preloaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pykern

ROOT = Path(pykern.__file__).parent.parent


def runtime(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        # Exceptions are intercepted, so the library that throws them must be there from the start.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # The stacks of kernel threads are the emulator's; Python frees what it holds by ending.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYKERN_EMULATOR_BUILD": "_emulator_address",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_kernel():
    done = run("-m", "tests.kernel_cases", "--device", "emulated")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("ok ") > 50


def test_every_vector():
    script = (
        "from tests.support import emulator\n"
        "from tests.emulator.ptx_cases import all_cases\n"
        "for case in all_cases().values():\n"
        "    case.compare(emulator().run_vector(case.kernel, case.options, case.data, case.expected.nbytes))\n"
    )
    done = run("-c", script)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "name, size, report",
    [("global_tail", 257, "heap-buffer-overflow"), ("shared_tail", 256, "heap-buffer-overflow")],
)
def test_planted_bug_is_caught(name, size, report):
    script = (
        "import sys, numpy as np; from tests.support import emulator\n"
        f"emulator().run_planted('{name}', sys.argv[1] == 'True', np.ones({size}, np.float32), {size})"
    )
    clean, buggy = run("-c", script, "False"), run("-c", script, "True")
    assert clean.returncode == 0, clean.stderr[-2000:]
    assert report in buggy.stderr and "planted.cu" in buggy.stderr
