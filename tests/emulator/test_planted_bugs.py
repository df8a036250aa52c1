"""The emulator catches each planted bug, and lets the same kernel without it pass."""

import subprocess
import sys

import numpy as np
import pytest

from tests.support import emulator

# What the emulator reports, or None where only the results tell: wrong, or never written (NaN).
REPORTS = {
    "missing_barrier": "race in shared memory",
    "missing_second_barrier": "race in shared memory",
    "global_tail": "outside all memory of this op: 4 bytes past the end of buffer",
    "shared_tail": "past the end of a shared object of 1024 bytes",
    "lane_mask": "names it",
    "misaligned_load": "misaligned read of 16 bytes",
    "last_tile": None,
    "unwritten_output": None,
    "divergent_barrier": "divergent barrier",
    "waits_for_ever": "hang",
    "order_dependent_sum": "results differ between thread orders",
    "writes_to_input": "an input that kernels may only read",
    "too_much_shared": "exceed the limit",
    "too_many_threads": "exceeds the limits",
}
# input size, output size, and the right results
CASES = {
    "missing_barrier": (256, 256, lambda x: x + np.roll(x, -1)),
    "missing_second_barrier": (256, 256, lambda x: np.float32(1) * np.roll(x, -1) + np.float32(2) * np.roll(x, -1)),
    "global_tail": (257, 257, lambda x: 2 * x),
    "shared_tail": (256, 256, lambda x: x),
    "lane_mask": (32, 32, None),
    "misaligned_load": (132, 32, lambda x: x[4::4]),
    "last_tile": (250, 250, lambda x: -x),
    "unwritten_output": (200, 200, lambda x: np.maximum(x, 0)),
    "divergent_barrier": (64, 64, lambda x: x),
    "waits_for_ever": (64, 64, lambda x: x),
    "order_dependent_sum": (40, 1, None),
    "writes_to_input": (64, 64, np.ones_like),
    "too_much_shared": (64, 64, lambda x: x),
    "too_many_threads": (64, 64, np.ones_like),
}


def run(name: str, buggy: bool):
    size, results, _ = CASES[name]
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    return values, emulator().run_planted(name, buggy, values, results)


def test_every_planted_kernel_has_a_case():
    assert sorted(emulator().planted()) == sorted([*CASES, "overflowing_index"])


@pytest.mark.parametrize("name", CASES)
def test_clean_sibling_passes(name):
    values, results = run(name, buggy=False)
    expected = CASES[name][2]
    assert not np.isnan(results).any()
    if expected is not None:
        np.testing.assert_array_equal(results, expected(values))


@pytest.mark.parametrize("name", [name for name, report in REPORTS.items() if report])
def test_bug_is_reported(name):
    with pytest.raises(RuntimeError, match=REPORTS[name]):
        run(name, buggy=True)


@pytest.mark.parametrize("name", [name for name, report in REPORTS.items() if not report])
def test_bug_shows_as_poison(name):
    values, results = run(name, buggy=True)
    assert np.isnan(results).any()


def test_report_names_source_line():
    with pytest.raises(RuntimeError, match=r"planted\.cu:\d+"):
        run("missing_barrier", buggy=True)


@pytest.mark.parametrize("order", ["forward", "reverse", "random:3"])
def test_races_are_reported_in_every_order(order):
    module = emulator()
    before = module.orders()
    module.set_orders([order])
    try:
        with pytest.raises(RuntimeError, match="race in shared memory"):
            run("missing_barrier", buggy=True)
    finally:
        module.set_orders(before)


def test_index_overflow_stops_the_program():
    script = (
        "import sys, numpy as np; from tests.support import emulator\n"
        "emulator().run_planted('overflowing_index', sys.argv[1] == 'True', np.ones(4, np.float32), 4)"
    )
    clean, buggy = (
        subprocess.run([sys.executable, "-c", script, flag], capture_output=True, text=True, check=False)
        for flag in ("False", "True")
    )
    assert clean.returncode == 0, clean.stderr
    assert buggy.returncode != 0
    assert "signed integer overflow" in buggy.stderr
