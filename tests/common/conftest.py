"""Compiles floor.cpp for every instruction-set level, with the flags of the build itself."""

import ctypes
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import available_levels

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ROOT / "build" / "cmake" / "compile_commands.json"


def level_command(level: str) -> list[str]:
    """The build's own compile command for a level, without its source and output."""
    assert COMMANDS.exists(), f"{COMMANDS} is missing: run 'make build' first"
    for entry in json.loads(COMMANDS.read_text()):
        if f"simd_{level}.dir" in entry["output"] and entry["file"].endswith("peak.simd.cpp"):
            command = shlex.split(entry["command"])
            return command[: command.index("-o")]
    raise AssertionError(f"the build has no level {level}")


def compile_floor(folder: Path, level: str, *definitions: str) -> ctypes.CDLL:
    library = folder / f"floor_{level}{'_twin' if definitions else ''}.so"
    source = Path(__file__).with_name("floor.cpp")
    subprocess.run([*level_command(level), *definitions, "-shared", "-o", library, source], check=True)
    functions = ctypes.CDLL(str(library))
    functions.compute_is_narrow.restype = ctypes.c_bool
    functions.pack_pairs.restype = ctypes.c_int64
    return functions


@pytest.fixture(scope="session")
def floors(tmp_path_factory):
    """The floor of each level that runs here; compiled when first asked for."""
    folder = tmp_path_factory.mktemp("floor")
    compiled = {}

    def get(level: str) -> ctypes.CDLL:
        if level not in compiled:
            compiled[level] = compile_floor(folder, level)
        return compiled[level]

    return get


@pytest.fixture(params=available_levels())
def floor(request, floors):
    return floors(request.param)


@pytest.fixture(scope="session")
def tile_floor(tmp_path_factory):
    """The portable level with the scalar twin of the tile registers."""
    floor = compile_floor(tmp_path_factory.mktemp("twin"), "portable", "-DPYKERN_TILE_TWIN")
    floor.tile_self_check.restype = ctypes.c_bool
    return floor
