"""Builds pykern's native libraries with CMake; imports no torch, so metadata and sdists need none.

Environment: MAX_JOBS (compile jobs), PYKERN_TORCH_ROOT (folder of the torch package to compile
against), PYKERN_SIMD_LEVELS (semicolon list, to shorten development builds).
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = (ROOT / "pykern" / "VERSION").read_text().strip()

# A free-threaded interpreter has no limited API, so its wheel is bound to one CPython version.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")


def torch_root():
    """The folder of the torch package, found without importing it."""
    given = os.environ.get("PYKERN_TORCH_ROOT")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "pykern: torch >= 2.11 was not found; install it first, or set PYKERN_TORCH_ROOT to its package folder"
        )
    return Path(spec.origin).parent


class CMakeBuild(build_ext):
    """One CMake run that makes every native library of the package."""

    def run(self):
        build_folder = ROOT / "build" / "cmake"
        output_folder = Path(self.build_lib).resolve() / "pykern"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_folder), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPYKERN_TORCH_ROOT={torch_root()}",
            f"-DPYKERN_PYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DPYKERN_ABI3={'ON' if ABI3 else 'OFF'}",
        ]  # fmt: skip
        # Always passed: CMake would otherwise go on using a value of an earlier run.
        configure.append(f"-DPYKERN_SIMD_LEVELS={os.environ.get('PYKERN_SIMD_LEVELS', '')}")
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build_folder), "--parallel", jobs], check=True)

        target = ROOT / "pykern" if self.inplace or self.editable_mode else output_folder
        target.mkdir(parents=True, exist_ok=True)
        for library in sorted(build_folder.glob("_C*.so")):
            # Replaced by a rename: a process that has the old library mapped keeps it whole.
            temporary = target / (library.name + ".new")
            shutil.copy2(library, temporary)
            temporary.replace(target / library.name)

    def get_source_files(self):
        return []

    def get_outputs(self):
        return [] if self.inplace or self.editable_mode else [str(Path(self.build_lib) / "pykern" / "_C.abi3.so")]


setup(
    version=VERSION,
    ext_modules=[Extension("pykern._C", sources=[], py_limited_api=ABI3)],
    package_data={"pykern": ["VERSION", "*.so"]},
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
