"""Builds pykern's native libraries with CMake; imports no torch, so metadata and sdists need none.

Environment:
  MAX_JOBS              compile jobs, by default one per processor
  CXX, CUDACXX          C++ and CUDA compilers, by default those on the PATH; CUDAHOSTCXX: the one that nvcc calls
  PYKERN_TORCH_ROOT     folder of the torch package to compile against
  PYKERN_SIMD_LEVELS    semicolon list of instruction-set levels, to shorten development builds
  PYKERN_CUDA           auto (default): the CUDA library is built where nvcc is found; 0: never; 1: fail without nvcc
  PYKERN_CUDA_ARCHS     semicolon list of GPU architectures (default 90a), or "release" for all that wheels have
  PYKERN_EMULATOR       semicolon list of the tests' kernel emulators: checked, address
  PYKERN_DEBUG          1: the CPU library is compiled without optimization, in half the time
  PYKERN_LOCAL_VERSION  1: the version tells what is in the wheel, as in 0.1.0+cpu or 0.1.0+cu130
  PYKERN_BUILD_FOLDER   where CMake works, by default build/cmake
"""

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = (ROOT / "pykern" / "VERSION").read_text().strip()

# A free-threaded interpreter has no limited API, so its wheel is bound to one CPython version.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
SUFFIX = ".abi3.so" if ABI3 else ".so"
LIBRARY, CUDA_LIBRARY = "_C" + SUFFIX, "_C_cuda" + SUFFIX

# Modules of the tests, which CMake leaves in build/emulator.
EMULATORS = {"checked": "_emulator.so", "address": "_emulator_address.so"}


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


@functools.cache
def nvcc() -> str:
    """The CUDA compiler to build with, or "" for none."""
    wanted = os.environ.get("PYKERN_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"pykern: PYKERN_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return ""
    named = os.environ.get("CUDACXX")
    if named:
        places = [named]
    else:
        toolkits = filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"])
        places = ["nvcc", *(os.path.join(toolkit, "bin", "nvcc") for toolkit in toolkits)]
    found = next(filter(None, map(shutil.which, places)), "")
    if not found and named:
        raise SystemExit(f"pykern: the CUDA compiler that CUDACXX names, {named!r}, was not found")
    if not found and wanted == "1":
        raise SystemExit(
            "pykern: PYKERN_CUDA=1, but no CUDA compiler (nvcc) was found; put it on the PATH or name it in CUDACXX"
        )
    return found


def version() -> str:
    if os.environ.get("PYKERN_LOCAL_VERSION") != "1":
        return VERSION
    if not nvcc():
        return VERSION + "+cpu"
    told = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return VERSION + "+cu{}{}".format(*re.search(r"release (\d+)\.(\d+)", told).groups())


def run(*command: str) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        way_out = "; PYKERN_CUDA=0 builds without CUDA" if nvcc() else ""
        raise SystemExit(
            f"pykern: the native build failed in '{Path(command[0]).name} {command[1]}'; see above{way_out}"
        ) from error


def place(built: Path, target: Path) -> None:
    """Puts a library where it belongs, or removes an older one if this build made none."""
    if not built.exists():
        target.unlink(missing_ok=True)
        return
    # Replaced by a rename: a process that has the old library mapped keeps it whole.
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".new")
    shutil.copy2(built, temporary)
    temporary.replace(target)


class CMakeBuild(build_ext):
    """One CMake run that makes every native library of the package."""

    def run(self):
        root = torch_root()
        check_compiler()
        cmake, ninja = tool("cmake"), tool("ninja")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        emulators = list(filter(None, os.environ.get("PYKERN_EMULATOR", "").split(";")))
        if not EMULATORS.keys() >= set(emulators):
            raise SystemExit(
                f"pykern: PYKERN_EMULATOR: expected a semicolon list of {', '.join(EMULATORS)}, "
                f"got {';'.join(emulators)!r}"
            )
        folder = ROOT / os.environ.get("PYKERN_BUILD_FOLDER", "build/cmake")
        in_tree = self.inplace or self.editable_mode
        # Every value is always passed: CMake would otherwise go on using that of an earlier run, the
        # path of a ninja in a temporary build environment of pip among them.
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "PYKERN_TORCH_ROOT": root,
            "PYKERN_PYTHON": sys.executable,
            "PYKERN_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYKERN_ABI3": "ON" if ABI3 else "OFF",
            "PYKERN_SIMD_LEVELS": os.environ.get("PYKERN_SIMD_LEVELS", ""),
            "PYKERN_CUDA": "ON" if nvcc() else "OFF",
            "PYKERN_CUDA_ARCHS": os.environ.get("PYKERN_CUDA_ARCHS") or "90a",
            "PYKERN_EMULATOR": ";".join(emulators),
            "PYKERN_DEBUG": "ON" if os.environ.get("PYKERN_DEBUG") == "1" else "OFF",
            "PYKERN_JOBS": jobs,
        }
        if nvcc():
            settings["CMAKE_CUDA_COMPILER"] = nvcc()
        # CMake can't change the CUDA compiler of a build folder; it would keep the old one.
        cached = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", read_text(folder / "CMakeCache.txt"), re.MULTILINE)
        fresh = ["--fresh"] if cached and nvcc() and cached[1] != nvcc() else []
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        run(cmake, *fresh, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "--log-level=WARNING", *definitions)
        # What an earlier build left would pass for made by this one, had this one left it out.
        if not nvcc():
            (folder / CUDA_LIBRARY).unlink(missing_ok=True)
        for name, library in EMULATORS.items():
            if in_tree and name not in emulators:
                (ROOT / "build" / "emulator" / library).unlink(missing_ok=True)
        run(cmake, "--build", str(folder), "--parallel", jobs)

        target = ROOT / "pykern" if in_tree else Path(self.build_lib) / "pykern"
        for name in (LIBRARY, CUDA_LIBRARY):
            place(folder / name, target / name)

    def get_source_files(self):
        return []

    def get_outputs(self):
        if self.inplace or self.editable_mode:
            return []
        libraries = [Path(self.build_lib) / "pykern" / name for name in (LIBRARY, CUDA_LIBRARY)]
        return [str(path) for path in libraries if path.exists()]


# GLIBC_2.x of the first common systems whose C++ library has GLIBCXX_3.4.y, by y.
GLIBC_OF_GLIBCXX = {24: 28, 28: 31, 29: 34, 30: 35, 33: 39}


def manylinux(libraries: list[Path], machine: str) -> str:
    """The oldest manylinux platform that has every symbol of these libraries."""
    newest = 28  # what torch itself needs
    for content in (path.read_bytes() for path in libraries):
        newest = max([newest, *map(int, re.findall(rb"\0GLIBC_2\.(\d+)", content))])
        for wanted in map(int, re.findall(rb"\0GLIBCXX_3\.4\.(\d+)", content)):
            newest = max(newest, min(glibc for offered, glibc in GLIBC_OF_GLIBCXX.items() if offered >= wanted))
    return f"manylinux_2_{newest}_{machine}"


class Wheel(bdist_wheel):
    """A wheel that is named for the systems whose libraries have all that its own need."""

    def get_tag(self):
        python, abi, system = super().get_tag()
        libraries = list(Path(self.get_finalized_command("build_ext").build_lib, "pykern").glob("_C*.so"))
        if libraries and system.startswith("linux_") and platform.libc_ver()[0] == "glibc":
            system = manylinux(libraries, system[len("linux_") :])
        return python, abi, system


setup(
    version=version(),
    ext_modules=[Extension("pykern._C", sources=[], py_limited_api=ABI3)],
    package_data={"pykern": ["VERSION"]},
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
