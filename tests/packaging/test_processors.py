"""The portable level on processors that this machine is not: arm64, and x86-64 without AVX."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CROSS = shutil.which("aarch64-linux-gnu-g++")
COMMON = ["-std=gnu++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
COMMON += [f"-I{ROOT / 'csrc'}", f"-I{ROOT}"]
KERNELS = ["-DPYKERN_SIMD=portable", "-DPYKERN_SIMD_IS_portable", "-fno-math-errno", "-fno-trapping-math"]
SOURCES = sorted((ROOT / "csrc").rglob("*.cpp"))

needs_cross = pytest.mark.skipif(not CROSS, reason="no arm64 cross compiler (package g++-aarch64-linux-gnu)")


def program(compiler, target, *flags):
    source = Path(__file__).with_name("portable.cpp")
    definitions = [*COMMON, *KERNELS, "-DPYKERN_TILE_TWIN", "-O2", "-ffp-contract=fast", *flags]
    subprocess.run([compiler, *definitions, "-o", target, source], check=True)


def check(*command):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "0 products, 0 halves, 0 exponentials\n"


@needs_cross
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_source_compiles_for_arm64(source):
    headers = Path(torch.__file__).parent / "include"
    flags = KERNELS if source.name.endswith(".simd.cpp") else [
        "-isystem", headers, "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPYKERN_HAS_portable",
        "-DPYKERN_MODULE=_C", '-DPYKERN_CUDA_ARCHITECTURES="90a"', '-DPYKERN_CUDA_COMPILER="nvcc"',
        "-DPy_LIMITED_API=0x030a0000", "-isystem", sysconfig.get_path("include"),
    ]  # fmt: skip
    subprocess.run([CROSS, *COMMON, *flags, "-fsyntax-only", "-Werror", source], check=True)


@needs_cross
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="no arm64 emulator (package qemu-user)")
def test_floor_runs_on_arm64(tmp_path):
    program(CROSS, tmp_path / "portable", "-static")
    check("qemu-aarch64", tmp_path / "portable")


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="no x86-64 emulator (package qemu-user)")
def test_floor_runs_on_x86_64_without_avx(tmp_path):
    program(shutil.which("x86_64-linux-gnu-g++") or shutil.which("c++"), tmp_path / "portable")
    check("qemu-x86_64", "-cpu", "Nehalem", tmp_path / "portable")


def test_floor_runs_here(tmp_path):
    program(shutil.which("c++") or shutil.which("g++"), tmp_path / "portable")
    check(tmp_path / "portable")
