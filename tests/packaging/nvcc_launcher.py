"""Runs nvcc for the build of the tests, and remembers what it made of the kernels, so that no test compiles them again.

'make test' has CMake put this before every call of nvcc. Whatever the call is, nvcc gets it, and its exit status and
messages are passed on; what budgets.py would measure is kept where it looks if the call is one that it would make.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.packaging import budgets  # noqa: E402

# What ptxas tells of every kernel because it is asked to.
LISTED = re.compile(
    r"ptxas info\s*: (Compiling entry function|Function properties|Used \d+ registers|\d+ bytes gmem)"
    r"|\s+\d+ bytes stack frame|ptxas info\s*: Compile time"
)


def measured_place(command: list[str]) -> tuple[Path, str] | None:
    """Source and architecture of a call that compiles one of the kernels' sources, for one architecture."""
    if "-c" not in command[:-1] or not set(budgets.FLAGS) <= set(command):
        return None
    source = Path(command[command.index("-c") + 1]).resolve()
    architectures = re.findall(r"code=sm_(\w+)", " ".join(command))
    wanted = [place for place in budgets.sources() if place[0] == source and [place[1]] == architectures]
    return wanted[0] if wanted and " ".join(command).count("code=") == 1 else None


def main(command: list[str]) -> int:
    place = measured_place(command)
    if not place:
        return subprocess.run(command).returncode
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [*command, budgets.TOLD, "--keep", "--keep-dir", folder], capture_output=True, text=True
        )
        told = result.stdout + result.stderr
        for line in told.splitlines():
            if not LISTED.match(line):
                print(line, file=sys.stderr)
        if result.returncode == 0:
            try:
                (ptx,), (cubin,) = (list(Path(folder).glob(pattern)) for pattern in ("*.ptx", "*.cubin"))
                kept = budgets.memory(*place)
                usages = budgets.usages_of(place[0], told, ptx.read_text(), cubin)
                shutil.copy2(cubin, kept.with_suffix(".cubin"))
                budgets.remember(kept, usages)
            except Exception as error:
                # The library is built; the tests compile this source themselves and say what is wrong with it.
                print(f"{place[0]}: not measured, {error!r}"[:500], file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
