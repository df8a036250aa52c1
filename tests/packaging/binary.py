"""What binutils say of the libraries and objects that the build has made."""

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = next((ROOT / "pykern").glob("_C.*so"))
CUDA_LIBRARY = next((ROOT / "pykern").glob("_C_cuda.*so"), None)
LIBRARIES = [LIBRARY, *([CUDA_LIBRARY] if CUDA_LIBRARY else [])]
OBJECTS = ROOT / "build" / "cmake" / "CMakeFiles"


def output(tool: str, *arguments) -> str:
    assert shutil.which(tool), f"{tool} is missing; it comes with the compiler (package binutils)"
    return subprocess.run([tool, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def levels() -> list[str]:
    """The instruction-set levels of the build, whether or not this machine runs them."""
    return sorted(folder.name[len("simd_") : -len(".dir")] for folder in OBJECTS.glob("simd_*.dir"))


def level_objects(level: str) -> list[Path]:
    return live(OBJECTS / f"simd_{level}.dir")


def host_objects() -> list[Path]:
    return live(OBJECTS / "_C.dir")


def live(folder: Path) -> list[Path]:
    """Objects whose source is still there: the build folder keeps those of sources that are gone."""
    return [path for path in sorted(folder.rglob("*.o")) if (ROOT / path.relative_to(folder).with_suffix("")).exists()]


def defined_symbols(path: Path) -> list[tuple[str, str]]:
    """(kind, demangled name) of the symbols that an object offers to the linker."""
    found = []
    for line in output("nm", "--demangle", "--extern-only", "--defined-only", path).splitlines():
        match = re.match(r"[0-9a-f]* +([A-Za-z]) (.*)", line)
        if match:
            found.append(match.groups())
    return found


def needed(path: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "--dynamic", "--wide", path)))
