"""Source archive, wheel, editable install, and what a build says when something is missing."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import pykern

ROOT = Path(__file__).resolve().parents[2]
VERSION = (ROOT / "pykern" / "VERSION").read_text().strip()
SOURCES = ["CMakeLists.txt", "LICENSE", "Makefile", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"]
FOLDERS = ["bench", "csrc", "kernels", "pykern", "tests"]
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

# One level alone: these tests ask for the package, not for its kernels.
ENVIRONMENT = {**os.environ, "PYKERN_SIMD_LEVELS": "portable", "PYTHONPATH": ""}
ENVIRONMENT["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
ENVIRONMENT.pop("PYKERN_TORCH_ROOT", None)


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
def wheel(unpacked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, unpacked, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


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


def test_wheel_is_named_for_what_it_runs_on(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    python = "cp310-abi3" if ABI3 else f"cp{sys.version_info[0]}{sys.version_info[1]}-cp{sys.version_info[0]}{sys.version_info[1]}t"
    assert wheel.name == f"pykern-{VERSION}-{python}-{platform}.whl"


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"pykern", f"pykern-{VERSION}.dist-info"}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "pykern").rglob("*.py")} | {"pykern/VERSION"}
    assert expected <= set(names)
    assert [name for name in names if name.endswith(".so")] == ["pykern/_C.abi3.so" if ABI3 else "pykern/_C.so"]
    assert set(names) - expected - {name for name in names if "dist-info" in name or name.endswith(".so")} == set()


def test_wheel_metadata(wheel):
    opened = zipfile.ZipFile(wheel)
    tags = email.message_from_bytes(opened.read(f"pykern-{VERSION}.dist-info/WHEEL"))
    assert tags["Root-Is-Purelib"] == "false"
    assert tags["Tag"] == wheel.stem.split("-", 2)[2]
    metadata = email.message_from_bytes(opened.read(f"pykern-{VERSION}.dist-info/METADATA"))
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line] == ["torch>=2.11", "numpy"]
    assert {"train", "test", "peers"} <= set(metadata.get_all("Provides-Extra"))


SHOW = "import pykern, torch; print(pykern.__file__); print(torch.ops.pykern.matmul_in_cache(False, 1) > 0)"


def test_installed_wheel_runs_outside_the_tree(wheel, tmp_path):
    pip("install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    where = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "site")}
    assert succeed(sys.executable, "-c", SHOW, **where).split() == [str(tmp_path / "site/pykern/__init__.py"), "True"]
    told = succeed(sys.executable, "-m", "pykern", "info", **where)
    assert f"pykern        {VERSION}" in told and "portable" in told


def test_editable_install_follows_the_sources(wheel, unpacked, tmp_path):
    succeed(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    packages = succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    here = [path for path in sys.path if path.endswith("-packages")]
    Path(packages, "shared.pth").write_text("\n".join(here))
    pip("--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", unpacked, cwd=tmp_path)
    assert succeed(python, "-c", SHOW, cwd=tmp_path).split() == [str(unpacked / "pykern/__init__.py"), "True"]
    with open(unpacked / "pykern" / "__init__.py", "a") as file:
        file.write("\nFRESH = 17\n")
    assert succeed(python, "-c", "import pykern; print(pykern.FRESH)", cwd=tmp_path).strip() == "17"


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
    assert build_error(unpacked, PATH=str(tmp_path), CXX="") == "pykern: cmake was not found; 'pip install cmake' brings it"


def test_compile_error_ends_in_one_line(unpacked, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(unpacked, broken, ignore=shutil.ignore_patterns("build"))
    (broken / "csrc" / "module.cpp").write_text("#error broken on purpose\n")
    assert "the native build failed in 'cmake --build'; see above" in build_error(broken, MAX_JOBS="2")


def test_version_is_the_same_everywhere():
    assert pykern.info()["pykern"] == VERSION
