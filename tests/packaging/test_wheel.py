"""Source archive, wheel, editable install, and what a build says when something is missing."""

import email
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import pykern
from tests.test_readme import EXAMPLES

from . import binary
from .binary import CUDA_LIBRARY

ROOT = Path(__file__).resolve().parents[2]
VERSION = (ROOT / "pykern" / "VERSION").read_text().strip()
SOURCES = ["CMakeLists.txt", "LICENSE", "Makefile", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"]
FOLDERS = ["bench", "csrc", "kernels", "pykern", "tests"]
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

# One level, no CUDA and no optimization: these tests ask for the package, not for its kernels.
ENVIRONMENT = {**os.environ, "PYKERN_SIMD_LEVELS": "portable", "PYKERN_CUDA": "0", "PYKERN_DEBUG": "1"}
ENVIRONMENT["PYTHONPATH"] = ""
ENVIRONMENT["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
for name in ("PYKERN_TORCH_ROOT", "PYKERN_EMULATOR", "PYKERN_LOCAL_VERSION"):
    ENVIRONMENT.pop(name, None)


def run(*command, cwd, **environment):
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True
    )


def succeed(*command, cwd, **environment):
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip(*arguments, cwd):
    return succeed(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive of a copy of the tree, so that no build leaves traces in the tree itself."""
    copy = tmp_path_factory.mktemp("tree") / "pykern"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.new", "*.egg-info")
    for name in SOURCES:
        shutil.copy2(ROOT / name, copy / name)
    for name in FOLDERS:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    succeed(sys.executable, "-m", "build", "--sdist", "--no-isolation", copy, cwd=copy.parent)
    return copy / "dist" / f"pykern-{VERSION}.tar.gz"


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as opened:
        opened.extractall(folder)
    return folder / f"pykern-{VERSION}"


@pytest.fixture(scope="module")
def cpu_wheel(unpacked, tmp_path_factory):
    """From the source archive, without CUDA."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-build-isolation"]
    succeed(*command, "--no-deps", "--wheel-dir", folder, unpacked, cwd=folder, PYKERN_LOCAL_VERSION="1")
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def tree_wheel(tmp_path_factory):
    """Of the libraries that this tree's build made, with CUDA kernels where there is an nvcc; nothing is compiled."""
    folder = tmp_path_factory.mktemp("tree_wheel")
    cached = dict(
        re.findall(r"^(\w+):\w+=(.*)$", (ROOT / "build" / "cmake" / "CMakeCache.txt").read_text(), re.MULTILINE)
    )
    same = {
        name: cached[name]
        for name in ("PYKERN_SIMD_LEVELS", "PYKERN_CUDA_ARCHS", "PYKERN_EMULATOR", "PYKERN_TORCH_ROOT")
    }
    same |= {
        "PYKERN_CUDA": "1" if CUDA_LIBRARY else "0",
        "MAX_JOBS": cached["PYKERN_JOBS"],
        "PYKERN_LOCAL_VERSION": "1",
        "PYKERN_DEBUG": "0",
    }
    if CUDA_LIBRARY:
        same["CUDACXX"] = cached["CMAKE_CUDA_COMPILER"]
    succeed(
        sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder,
        "build", "--build-base", folder / "build",
        "bdist_wheel", "--bdist-dir", folder / "unpacked", "--dist-dir", folder / "dist", cwd=ROOT, **same,
    )  # fmt: skip
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module", params=["cpu_wheel", "tree_wheel"])
def wheel(request):
    return request.getfixturevalue(request.param)


def version_of(wheel):
    return wheel.name.split("-")[1]


def test_source_archive_is_whole(unpacked):
    for name in SOURCES:
        assert (unpacked / name).exists(), name
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".map", ".txt") or path.name == "VERSION":
                assert (unpacked / path.relative_to(ROOT)).exists(), path.relative_to(ROOT)


def test_source_archive_holds_no_binary(archive):
    with tarfile.open(archive) as opened:
        names = opened.getnames()
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", ".new"))]


def test_wheel_tells_what_is_in_it(cpu_wheel, tree_wheel):
    assert version_of(cpu_wheel) == f"{VERSION}+cpu"
    expected = rf"{re.escape(VERSION)}\+cu\d{{3}}" if CUDA_LIBRARY else rf"{re.escape(VERSION)}\+cpu"
    assert re.fullmatch(expected, version_of(tree_wheel))
    if CUDA_LIBRARY:
        release = re.match(r"nvcc (\d+)\.(\d+)", torch.ops.pykern.cuda_built_with()).groups()
        assert version_of(tree_wheel).endswith("+cu{}{}".format(*release))


# Newest versions of these symbols on the systems of a manylinux platform.
OFFERED = {
    "2_28": {"GLIBC_2": 28, "GLIBCXX_3.4": 24, "CXXABI_1.3": 11},
    "2_31": {"GLIBC_2": 31, "GLIBCXX_3.4": 28, "CXXABI_1.3": 12},
    "2_32": {"GLIBC_2": 32, "GLIBCXX_3.4": 28, "CXXABI_1.3": 12},
    "2_33": {"GLIBC_2": 33, "GLIBCXX_3.4": 28, "CXXABI_1.3": 12},
    "2_34": {"GLIBC_2": 34, "GLIBCXX_3.4": 29, "CXXABI_1.3": 13},
    "2_35": {"GLIBC_2": 35, "GLIBCXX_3.4": 30, "CXXABI_1.3": 13},
    "2_39": {"GLIBC_2": 39, "GLIBCXX_3.4": 33, "CXXABI_1.3": 15},
}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="manylinux is a name for systems with glibc")
def test_wheel_is_named_for_what_it_runs_on(wheel, tmp_path):
    _, _, python, abi, system = wheel.stem.split("-")
    minor = f"{sys.version_info[0]}{sys.version_info[1]}"
    assert (python, abi) == (("cp310", "abi3") if ABI3 else (f"cp{minor}", f"cp{minor}t"))
    match = re.fullmatch(r"manylinux_(\d+_\d+)_(\w+)", system)
    assert match and match[2] == sysconfig.get_platform().split("-", 1)[1]
    needed = {}
    with zipfile.ZipFile(wheel) as opened:
        for name in opened.namelist():
            if name.endswith(".so"):
                told = binary.output("readelf", "--version-info", "--wide", opened.extract(name, tmp_path))
                for kind, version in re.findall(r"Name: (GLIBC_2|GLIBCXX_3\.4|CXXABI_1\.3)\.(\d+)", told):
                    needed[kind] = max(needed.get(kind, 0), int(version))
    assert needed["GLIBC_2"] >= 2
    assert all(version <= OFFERED[match[1]][kind] for kind, version in needed.items()), needed


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"pykern", f"pykern-{version_of(wheel)}.dist-info"}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "pykern").rglob("*.py")} | {"pykern/VERSION"}
    assert expected <= set(names)
    suffix = ".abi3.so" if ABI3 else ".so"
    libraries = ["pykern/_C" + suffix] + (["pykern/_C_cuda" + suffix] if "+cu" in wheel.name else [])
    assert sorted(name for name in names if name.endswith(".so")) == libraries
    assert set(names) - expected - {name for name in names if "dist-info" in name or name.endswith(".so")} == set()


def test_wheel_metadata(wheel):
    opened = zipfile.ZipFile(wheel)
    folder = f"pykern-{version_of(wheel)}.dist-info"
    tags = email.message_from_bytes(opened.read(f"{folder}/WHEEL"))
    assert tags["Root-Is-Purelib"] == "false"
    assert tags["Tag"] == wheel.stem.split("-", 2)[2]
    metadata = email.message_from_bytes(opened.read(f"{folder}/METADATA"))
    assert metadata["Version"] == version_of(wheel)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line] == ["torch>=2.11", "numpy"]
    assert {"train", "test", "peers"} <= set(metadata.get_all("Provides-Extra"))


SHOW = "import pykern, torch; print(pykern.__file__); print(torch.ops.pykern.matmul_in_cache(False, 1) > 0)"


def environment(folder):
    """The Python of a new environment that has torch and numpy, but no pykern."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    packages = succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    here = [path for path in sys.path if path.endswith("-packages")]
    Path(packages, "shared.pth").write_text("\n".join(here))
    return python


def test_installed_wheel_runs_the_readme(tree_wheel, tmp_path):
    python = environment(tmp_path / "venv")
    pip("--python", python, "install", "--quiet", "--no-deps", tree_wheel, cwd=tmp_path)
    place, works = succeed(python, "-c", SHOW, cwd=tmp_path).split()
    assert Path(place).is_relative_to(tmp_path) and works == "True"
    told = succeed(python, "-m", "pykern", "info", cwd=tmp_path)
    assert re.search(rf"^pykern +{re.escape(VERSION)}$", told, re.MULTILINE) and "portable" in told
    assert ("cuda built with" in told) == ("+cu" in tree_wheel.name)
    # All in one process: what takes time is starting torch.
    script = tmp_path / "examples.py"
    script.write_text("\n".join(f"exec({code!r}, {{}})" for code in EXAMPLES))
    succeed(python, script, cwd=tmp_path)


def test_wheel_without_cuda_says_so(cpu_wheel, tmp_path):
    pip("install", "--quiet", "--no-deps", "--target", tmp_path / "site", cpu_wheel, cwd=tmp_path)
    told = succeed(sys.executable, "-m", "pykern", "info", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "not loaded: this build of pykern has no CUDA kernels" in told


def test_editable_install_follows_the_sources(cpu_wheel, unpacked, tmp_path):
    python = environment(tmp_path / "venv")
    pip("--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", unpacked, cwd=tmp_path)
    assert succeed(python, "-c", SHOW, cwd=tmp_path).split() == [str(unpacked / "pykern/__init__.py"), "True"]
    with open(unpacked / "pykern" / "__init__.py", "a") as file:
        file.write("\nFRESH = 17\n")
    assert succeed(python, "-c", "import pykern; print(pykern.FRESH)", cwd=tmp_path).strip() == "17"


def test_library_of_an_earlier_build_is_removed(cpu_wheel, unpacked):
    """A CUDA library whose sources have changed since must not be loaded beside a newer CPU library."""
    left = [unpacked / place / ("_C_cuda.abi3.so" if ABI3 else "_C_cuda.so") for place in ("pykern", "build/cmake")]
    emulator = unpacked / "build" / "emulator" / "_emulator.so"
    emulator.parent.mkdir(exist_ok=True)
    for path in [*left, emulator]:
        path.touch()
    succeed(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=unpacked)
    assert not [path for path in [*left, emulator] if path.exists()]


# --- what is missing is named, in one line ----------------------------------------------------------


def build_error(unpacked, *python_options, **environment):
    result = run(sys.executable, *python_options, "setup.py", "--quiet", "build_ext", cwd=unpacked, **environment)
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert lines and "Traceback" not in result.stderr
    return lines[-1]


def test_no_torch(unpacked, tmp_path):
    import setuptools

    tools = Path(setuptools.__file__).parent.parent
    for name in ("setuptools", "pkg_resources", "_distutils_hack"):
        if (tools / name).exists():
            (tmp_path / name).symlink_to(tools / name)
    line = build_error(unpacked, "-S", PYTHONPATH=str(tmp_path))
    assert line.startswith("pykern: torch >= 2.11 was not found; install it first")


def test_no_torch_where_the_variable_points(unpacked, tmp_path):
    assert "is not the folder of a torch package" in build_error(unpacked, PYKERN_TORCH_ROOT=str(tmp_path))


def test_torch_too_old(unpacked, tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    line = build_error(unpacked, PYKERN_TORCH_ROOT=str(tmp_path))
    assert line == f"pykern: torch >= 2.11 is needed, {tmp_path} holds 2.9; upgrade torch"


def test_no_compiler(unpacked, tmp_path):
    assert "no C++ compiler was found" in build_error(unpacked, PATH=str(tmp_path), CXX="")
    assert "'no-such-compiler', was not found" in build_error(unpacked, CXX="no-such-compiler")


def test_no_cmake(unpacked, tmp_path):
    (tmp_path / "c++").symlink_to(shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"))
    assert (
        build_error(unpacked, PATH=str(tmp_path), CXX="")
        == "pykern: cmake was not found; 'pip install cmake' brings it"
    )


def test_no_nvcc(unpacked, tmp_path):
    for tool in ("cmake", "ninja", "c++"):
        (tmp_path / tool).symlink_to(shutil.which(tool, path=ENVIRONMENT["PATH"]))
    line = build_error(unpacked, PYKERN_CUDA="1", CUDACXX=str(tmp_path / "no-such-nvcc"))
    assert line == f"pykern: the CUDA compiler that CUDACXX names, '{tmp_path}/no-such-nvcc', was not found"
    assert "PYKERN_CUDA: expected auto, 0 or 1, got 'yes'" in build_error(unpacked, PYKERN_CUDA="yes")
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        line = build_error(unpacked, PYKERN_CUDA="1", CUDACXX="", CUDA_HOME="", CUDA_PATH="", PATH=str(tmp_path))
        assert line.startswith("pykern: PYKERN_CUDA=1, but no CUDA compiler (nvcc) was found; put it on the PATH")


def test_unknown_emulator(unpacked):
    assert "PYKERN_EMULATOR: expected a semicolon list of checked, address" in build_error(
        unpacked, PYKERN_EMULATOR="fast"
    )


def test_compile_error_ends_in_one_line(unpacked, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(unpacked, broken, ignore=shutil.ignore_patterns("build"))
    (broken / "csrc" / "module.cpp").write_text("#error broken on purpose\n")
    assert "the native build failed in 'cmake --build'; see above" in build_error(broken, MAX_JOBS="2")


def test_version_is_the_same_everywhere():
    assert pykern.info()["pykern"] == VERSION
