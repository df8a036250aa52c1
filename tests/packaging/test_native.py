"""Loading the native library: what is said when it can't be, and which level it chooses."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import pykern
from pykern import _native
from pykern.__main__ import main

from .binary import LIBRARY, ROOT


def python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": str(cwd), **environment},
        capture_output=True, text=True
    )  # fmt: skip


@pytest.fixture
def package(tmp_path):
    """A copy of the package whose library may be harmed."""
    shutil.copytree(ROOT / "pykern", tmp_path / "pykern", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def import_error(package, prelude=""):
    result = python(
        "-c", f"{prelude}\ntry:\n    import pykern\nexcept ImportError as error:\n    print(error)", cwd=package
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.strip().splitlines()
    return line


def test_missing_library(package):
    (package / "pykern" / LIBRARY.name).unlink()
    assert import_error(package) == (
        f"pykern's native library is missing from {package}/pykern; build it with 'make build' or 'pip install .'"
    )


def test_damaged_library(package):
    library = package / "pykern" / LIBRARY.name
    library.write_bytes(library.read_bytes()[:100])
    line = import_error(package)
    assert line.startswith(f"pykern's native library {LIBRARY.name} does not load with torch {torch.__version__} on ")
    assert "rebuild it with 'make build'" in line and f"{library}: " in line


def test_library_of_another_machine(package):
    library = package / "pykern" / LIBRARY.name
    content = bytearray(library.read_bytes())
    content[18:20] = b"\x08\x00"  # the ELF header's machine: MIPS
    library.write_bytes(content)
    assert "does not load with torch" in import_error(package)


def test_old_torch(package):
    line = import_error(package, "import torch; torch.__version__ = '2.10.1+cpu'")
    assert line == "pykern needs torch >= 2.11, this is torch 2.10.1+cpu; upgrade torch"


def test_info_names_everything():
    entries = pykern.info()
    expected = ["pykern", "torch", "python", "machine", "built with", "cpu level", "cpu threads", "cuda kernels"]
    assert list(entries)[: len(expected)] == expected
    assert all("cuda" in name.split() for name in list(entries)[len(expected) :])
    assert all(isinstance(value, str) and value for value in entries.values())
    assert "portable" in entries["built with"]


def test_command_line(capsys):
    result = python("-m", "pykern", "info", cwd=ROOT)
    assert result.returncode == 0 and "cpu level" in result.stdout
    assert main([]) == 0 and capsys.readouterr().out.startswith("usage: python -m pykern COMMAND")
    assert main(["fly"]) == 2 and capsys.readouterr().err.startswith("pykern: unknown command 'fly'")


SHOW = "import pykern._native as n; print(n.cpu_level())"


@pytest.mark.parametrize("level", ["portable", "amx"])
def test_level_asked_for_by_the_environment(level):
    result = python("-c", SHOW, cwd=ROOT, PYKERN_CPU_LEVEL=level)
    order = _native.CPU_LEVELS.index
    chosen = result.stdout.strip()
    assert chosen == level or (order(chosen) < order(level) and f"got '{level}'; {chosen} is used" in result.stderr)
    assert level != "portable" or chosen == "portable"


def test_unknown_level_is_named():
    result = python("-c", SHOW, cwd=ROOT, PYKERN_CPU_LEVEL="sse9")
    assert result.stdout.strip() == _native.best_cpu_level()
    assert "PYKERN_CPU_LEVEL: expected one of portable, avx2, avx512, avx512_bf16, amx, got 'sse9'" in result.stderr


def test_level_for_a_block():
    before = _native.cpu_level()
    with _native.use_cpu_level("portable"):
        assert _native.cpu_level() == "portable"
        assert torch.ops.pykern.matmul_in_cache.default(True, 1) > 0
    assert _native.cpu_level() == before
    with pytest.raises(ValueError, match="level: expected an instruction set this machine has .*, got 'sse9'"):
        with _native.use_cpu_level("sse9"):
            pass
