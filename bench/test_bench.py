"""The bench cases under pytest-benchmark: `pytest bench --benchmark-json=FILE`."""

import pytest

from bench.harness import load_cases

CASES = load_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_bench(benchmark, case):
    """Times pykern's own provider; `python -m pykern bench` compares all of them."""
    provider, function = next(iter(case.make().items()))
    benchmark.extra_info.update(provider=provider, flops=case.flops, bytes=case.bytes)
    benchmark(function)
