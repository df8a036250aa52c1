"""Builds pykern's native libraries with CMake; imports no torch, so metadata and sdists need none.

Environment: MAX_JOBS (compile jobs), CXX (compiler), PYKERN_TORCH_ROOT (folder of the torch package
to compile against), PYKERN_SIMD_LEVELS (semicolon list, to shorten development builds).
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = (ROOT / "pykern" / "VERSION").read_text().strip()

# A free-threaded interpreter has no limited API, so its wheel is bound to one CPython version.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
LIBRARY = "_C.abi3.so" if ABI3 else "_C.so"


def torch_root() -> Path:
    """The folder of the torch package, found without importing it."""
    given = os.environ.get("PYKERN_TORCH_ROOT")
    spec = None if given else importlib.util.find_spec("torch")
    if not given and (spec is None or spec.origin is None):
        raise SystemExit(
            "pykern: torch >= 2.11 was not found; install it first, or set PYKERN_TORCH_ROOT to its package folder"
        )
    root = Path(given) if given else Path(spec.origin).parent
    version = re.search(r"__version__ = '(\d+)\.(\d+)", read_text(root / "version.py"))
    if not version:
        raise SystemExit(f"pykern: {root} is not the folder of a torch package (it has no version.py)")
    if tuple(map(int, version.groups())) < (2, 11):
        raise SystemExit(f"pykern: torch >= 2.11 is needed, {root} holds {'.'.join(version.groups())}; upgrade torch")
    return root


def read_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def tool(name: str) -> str:
    found = shutil.which(name)
    if not found:
        raise SystemExit(f"pykern: {name} was not found; 'pip install {name}' brings it")
    return found


def check_compiler() -> None:
    wanted = os.environ.get("CXX")
    if wanted and not shutil.which(wanted.split()[0]):
        raise SystemExit(f"pykern: the C++ compiler that CXX names, {wanted!r}, was not found")
    if not wanted and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SystemExit("pykern: no C++ compiler was found; install g++ or clang++, or name one in CXX")


def run(*command: str) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pykern: the native build failed in '{Path(command[0]).name} {command[1]}'; see above") from error


class CMakeBuild(build_ext):
    """One CMake run that makes every native library of the package."""

    def run(self):
        root = torch_root()
        check_compiler()
        cmake, ninja = tool("cmake"), tool("ninja")
        folder = ROOT / "build" / "cmake"
        # Every value is always passed: CMake would otherwise go on using that of an earlier run, the
        # path of a ninja in a temporary build environment of pip among them.
        run(
            cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "--log-level=WARNING",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPYKERN_TORCH_ROOT={root}",
            f"-DPYKERN_PYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DPYKERN_ABI3={'ON' if ABI3 else 'OFF'}",
            f"-DPYKERN_SIMD_LEVELS={os.environ.get('PYKERN_SIMD_LEVELS', '')}",
            f"-DPYKERN_PYTHON={sys.executable}",
            f"-DPYKERN_EMULATOR={os.environ.get('PYKERN_EMULATOR', '')}",
        )  # fmt: skip
        run(cmake, "--build", str(folder), "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)))

        target = ROOT / "pykern" if self.inplace or self.editable_mode else Path(self.build_lib) / "pykern"
        target.mkdir(parents=True, exist_ok=True)
        # Replaced by a rename: a process that has the old library mapped keeps it whole.
        temporary = target / (LIBRARY + ".new")
        shutil.copy2(folder / LIBRARY, temporary)
        temporary.replace(target / LIBRARY)

    def get_source_files(self):
        return []

    def get_outputs(self):
        return [] if self.inplace or self.editable_mode else [str(Path(self.build_lib) / "pykern" / LIBRARY)]


setup(
    version=VERSION,
    ext_modules=[Extension("pykern._C", sources=[], py_limited_api=ABI3)],
    package_data={"pykern": ["VERSION"]},
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
