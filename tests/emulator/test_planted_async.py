"""The emulator catches each bug around asynchronous copies and matrix products, and lets the right kernel pass."""

from contextlib import contextmanager

import numpy as np
import pytest

from tests.support import emulator

NOT_FILLED = "an asynchronous copy has not filled yet"
RACE = "race in shared memory"

# What the emulator reports, or None where only the results tell.
REPORTS = {
    "copy_read_before_wait": NOT_FILLED,
    "copy_not_committed": NOT_FILLED,
    "copy_read_by_others": RACE,
    "copy_over_what_is_read": f"{RACE}|{NOT_FILLED}",
    "bulk_read_before_wait": f"{NOT_FILLED}|{RACE}",
    "bulk_wait_without_result": f"{NOT_FILLED}|{RACE}",
    "bulk_expects_too_much": r"hang: .* phase 0 of the mbarrier at byte 0 of static shared memory "
    r"\(.*planted_async.cu:\d+\), which misses 0 of 1 arrivals and 16 bytes",
    "bulk_arrival_missing": "hang: .* misses 1 of 2 arrivals and 0 bytes",
    "bulk_arrival_too_early": RACE,
    "bulk_over_what_is_read": f"{RACE}|more than its 1 arrivals",
    "bulk_mbarrier_unknown": "initialised without fence.mbarrier_init",
    "bulk_store_without_fence": "without fence.proxy.async",
    "bulk_store_without_wait": "under way still reads",
    "wrong_fragment": None,
    "product_without_proxy_fence": "wgmma reads byte 0 of a shared object, which thread .* without fence.proxy.async",
    "product_of_other_swizzle": "where its swizzle repeats",
    "product_read_before_wait": None,
    "product_without_fence": "no wgmma.fence",
    "product_tile_overwritten": f"under way still reads|{RACE}",
    "product_of_one_warp": "hang: .* wait in wgmma.wait_group",
}
ORDERS = ["together", "forward", "reverse", "random:7"]
# In a fixed order the copy lands while the thread waits; the default orders together must see the bug.
ONLY_TOGETHER = {"bulk_wait_without_result", "bulk_arrival_too_early"}


def run(name: str, buggy: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel makes of small integers, and the right results."""
    size = {"copy": 1280, "bulk": 1280, "wrong": 16 * 24, "product": 64 * 72}[name.split("_")[0]]
    values = np.random.default_rng(0).integers(-4, 5, size).astype(np.float32)
    if name.startswith("wrong"):
        expected = values[:256].reshape(16, 16) @ values[256:].reshape(8, 16).T
    elif name.startswith("product"):
        expected = values[:4096].reshape(64, 64) @ values[4096:].reshape(8, 64).T
    else:
        expected = values * (2 if name.startswith("bulk") else 1)
    results = emulator().run_planted(name, buggy, values, expected.size)
    return results.reshape(expected.shape), expected


@contextmanager
def in_order(order: str):
    """Runs a block in one thread order, or in the default ones."""
    module = emulator()
    before = module.orders()
    if order != "together":
        module.set_orders([order])
    try:
        yield
    finally:
        module.set_orders(before)


def test_every_planted_kernel_has_a_case():
    assert sorted(emulator().planted_async()) == sorted(REPORTS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", REPORTS)
def test_clean_sibling_passes(name, order):
    with in_order(order):
        results, expected = run(name, buggy=False)
    np.testing.assert_array_equal(results, expected)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        (name, order)
        for name, report in REPORTS.items()
        for order in (ORDERS[:1] if name in ONLY_TOGETHER else ORDERS)
        if report
    ],
)
def test_bug_is_reported(name, order):
    with in_order(order), pytest.raises(RuntimeError, match=REPORTS[name]):
        run(name, buggy=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [name for name, report in REPORTS.items() if not report])
def test_bug_shows_in_results(name, order):
    with in_order(order):
        results, expected = run(name, buggy=True)
    assert not np.array_equal(results, expected)
    assert np.isnan(results).all() == (name == "product_read_before_wait")
