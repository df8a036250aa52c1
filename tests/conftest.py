"""What every test shares: the instruction-set levels of this machine, and a count that a run must reach."""

from pathlib import Path

import pytest
import torch

from pykern._native import best_cpu_level, use_cpu_level
from tests.support import DEVICES, on

LEVELS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]

# A run of the whole suite that executes fewer tests than this has lost some to skips or collection.
MINIMUM_EXECUTED = 300

# These files take longest, most of them by what one test or fixture does. Processes that files are shared out to begin
# with them: one that came last would be run by one process while the others had nothing left to do.
LONGEST = [
    "emulator/test_address_sanitizer.py", "packaging/test_wheel.py", "packaging/test_kernel_budgets.py",
    "lowrank/test_step.py", "policy/test_loss.py", "policy/test_kernels_loss.py", "lowrank/test_shards.py",
    "train/test_command.py",
]  # fmt: skip


def available_levels() -> list[str]:
    """Levels that run here, slowest first; a level left out of the build is left out of the list."""
    levels = []
    for level in LEVELS[: LEVELS.index(best_cpu_level()) + 1]:
        try:
            with use_cpu_level(level):
                levels.append(level)
        except ValueError:
            continue
    return levels


@pytest.fixture(params=available_levels())
def cpu_level(request):
    """Runs the test once on each instruction-set level."""
    with use_cpu_level(request.param):
        yield request.param


@pytest.fixture(params=DEVICES)
def device(request):
    """Runs the test once on each device; the value is the torch device for its tensors."""
    with on(request.param) as place:
        yield place


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    assert all(map(Path.exists, ranks)), "LONGEST in tests/conftest.py names a file that is not there"
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_terminal_summary(terminalreporter, config):
    executed = sum(len(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "failed"))
    skipped = len(terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(f"executed {executed} tests, skipped {skipped}, instruction sets {available_levels()}")


def pytest_sessionfinish(session, exitstatus):
    whole_suite = session.config.args == session.config.getini("testpaths") and not session.config.option.keyword
    # A worker of pytest-xdist sees its own share alone; the process that collects the results counts.
    if hasattr(session.config, "workerinput"):
        return
    if exitstatus == 0 and whole_suite and not session.config.option.collectonly:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        executed = len(reporter.stats.get("passed", []))
        if executed < MINIMUM_EXECUTED:
            reporter.write_line(
                f"only {executed} tests were executed, at least {MINIMUM_EXECUTED} are expected", red=True
            )
            session.exitstatus = 1
