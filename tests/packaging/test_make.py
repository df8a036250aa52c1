"""What `make` says on a machine that lacks something; each in one line, before anything is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


def make(checkout, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "CXX")}
    result = subprocess.run(
        ["make", "build", *arguments], cwd=checkout, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert not (checkout / ".venv").exists()
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def pretending(checkout, statement):
    """A Python that runs `statement` before the program of its -c option."""
    script = checkout / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{statement}\n$2"\n')
    script.chmod(0o755)
    return f"PYTHON={script}"


def test_no_python(checkout):
    assert make(checkout, "PYTHON=no-such-python").startswith(
        "pykern: no no-such-python was found; install Python 3.10"
    )


def test_old_python(checkout):
    line = make(checkout, pretending(checkout, "import sys; sys.version_info = (3, 8)"))
    assert line == "pykern: Python 3.10 or newer is needed, this is 3.8; name another: make PYTHON=python3.12"


def test_python_without_venv(checkout):
    line = make(checkout, pretending(checkout, "import sys; sys.modules['ensurepip'] = None"))
    assert line.startswith("pykern: this Python cannot make virtual environments") and "python3-venv" in line


def test_no_compiler(checkout):
    tools = checkout / "tools"
    tools.mkdir()
    for name in ("sh", "make", "env"):
        (tools / name).symlink_to(shutil.which(name))
    line = make(checkout, f"PYTHON={sys.executable}", PATH=str(tools))
    assert line == "pykern: no C++ compiler was found; install g++ or clang++, or name one in CXX"


def test_make_installs_what_the_tests_require():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = (ROOT / "Makefile").read_text().splitlines()
    tools = " ".join(line for line in lines if line.startswith(("TOOLS", "GPU_TOOLS")))
    required = {requirement.split(";")[0] for requirement in extras["train"] + extras["test"]}
    assert required <= set(tools.replace('"', "").split())


def test_peer_list_is_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = (ROOT / "tests" / "peers" / "requirements.txt").read_text().splitlines()
    assert set(extras["peers"]) <= set(listed)
