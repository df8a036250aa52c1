"""group_statistics against its definition in float64, and against closed forms."""

import math

import pytest
import torch

import pykern
from pykern.reference import policy_statistics as reference
from tests.support import assert_accurate, check_op, compile_whole, threads


def batch(rows: int, groups: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups in no order under huge and negative ids: a single, an equal one, one without a finite value."""
    values = (torch.randn(rows) * 3 + 1).to(dtype)
    ids = torch.randint(0, groups, (rows,)) * 1_000_000_007 - 5_000_000_000
    if rows >= 20:
        values[torch.randperm(rows)[: rows // 7]] = math.nan
        values[1], values[2] = math.inf, -math.inf
        ids[3] = torch.iinfo(torch.int64).min
        values[3], values[4:7], values[7:9] = 2.5, 0.1, math.nan
        ids[4:7], ids[7:9] = torch.iinfo(torch.int64).max, -1
    return values, ids


def assert_matches(values, ids, ddof=1):
    actual = pykern.group_statistics(values, ids, ddof=ddof)
    wide = values.dtype == torch.float64
    exact = reference.group_statistics(values.double(), ids, ddof=ddof)
    torch_own = reference.group_statistics(values.float(), ids, ddof=ddof)
    for result, expected, baseline in zip(actual[:2], exact, torch_own):
        assert result.dtype == (torch.float64 if wide else torch.float32)
        assert_accurate(result, expected, None if wide else baseline, units=20.0 if wide else 1.0)
    assert actual[2].dtype == torch.int64 and torch.equal(actual[2], exact[2])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("rows, groups", [(0, 1), (1, 1), (2, 1), (7, 3), (20, 2), (131, 17), (1300, 2), (1300, 400)])
def test_matches_definition(rows, groups, ddof, dtype):
    assert_matches(*batch(rows, groups, dtype), ddof)


@pytest.mark.usefixtures("everywhere")
def test_closed_form():
    values = torch.tensor([1.0, 7.0, 3.0, math.nan, 0.1, 0.1, 0.1, -math.inf, math.nan])
    ids = torch.tensor([4, -2, 4, 4, 0, 0, 0, 9, 9])
    mean, std, count = pykern.group_statistics(values, ids)
    nan = math.nan
    expected = torch.tensor([2.0, 7.0, 2.0, 2.0, 0.1, 0.1, 0.1, nan, nan])
    torch.testing.assert_close(mean, expected, rtol=0, atol=0, equal_nan=True)
    root = math.sqrt(2.0)
    expected = torch.tensor([root, 0.0, root, root, 0.0, 0.0, 0.0, nan, nan])
    torch.testing.assert_close(std, expected, rtol=0, atol=0, equal_nan=True)
    assert count.tolist() == [2, 1, 2, 2, 3, 3, 3, 0, 0]
    mean_by_n, by_n, count_by_n = pykern.group_statistics(values, ids, ddof=0)
    expected = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, nan, nan])
    torch.testing.assert_close(by_n, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mean_by_n, mean, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(count_by_n, count)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_values_are_exact(dtype):
    for value in (0.1, -1e-30, 3e37, 1 / 3):
        values = torch.full((701,), value, dtype=dtype)
        mean, std, count = pykern.group_statistics(values, torch.arange(701) % 3)
        assert torch.equal(mean, values)
        assert torch.count_nonzero(std) == 0
        assert torch.equal(count, torch.where(torch.arange(701) % 3 < 2, 234, 233))


@pytest.mark.usefixtures("everywhere")
def test_small_deviation_of_large_values():
    """Sums of squares, less the square of the sum, would have lost all of it."""
    values = torch.tensor([10000.0, 10000.001, 10000.002])
    _, std, _ = pykern.group_statistics(values, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(std, values.double().std().float().expand(3), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("everywhere")
def test_strides_types_and_repeats_agree():
    values, ids = batch(600, 9)
    bits = lambda results: [result.nan_to_num(-7.0) for result in results]  # noqa: E731
    straight = bits(pykern.group_statistics(values, ids))
    space = torch.empty(1200)[::2].copy_(values)
    spread = torch.empty(1200, dtype=torch.int64)[1::2].copy_(ids)
    with threads(1):
        others = [bits(pykern.group_statistics(space, spread)), bits(pykern.group_statistics(values, ids))]
    others.append(bits(pykern.group_statistics(values, -ids)))
    for other in others:
        assert all(map(torch.equal, other, straight))
    small = torch.arange(600) % 5
    narrow = bits(pykern.group_statistics(values, small.to(torch.int8)))
    assert all(map(torch.equal, narrow, bits(pykern.group_statistics(values, small))))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    values = torch.randn(9, dtype=dtype)
    check_op(torch.ops.pykern.group_statistics.default, (values, torch.arange(9) % 4, 1))


def test_compiles_whole_and_is_constant():
    values, ids = torch.randn(40, requires_grad=True), torch.arange(40) % 7
    plain = pykern.group_statistics(values, ids)
    compiled = compile_whole(lambda values: pykern.group_statistics(values, ids))(values)
    assert all(map(torch.equal, compiled, plain))
    assert not any(result.requires_grad for result in plain)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"values": [1.0]}, TypeError, "values: expected a floating-point tensor, got list"),
        ({"values": torch.ones(2).long()}, TypeError, "values: .* got torch.int64"),
        ({"values": torch.ones(2, 1)}, ValueError, r"values: expected one per row, \[N\], got \[2, 1\]"),
        ({"group_ids": torch.zeros(2)}, TypeError, "group_ids: .* got torch.float32"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"group_ids: .* \[2\], got \[3\]"),
        ({"group_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "group_ids: .* device of values"),
        ({"ddof": 2}, ValueError, "ddof: expected 0 or 1, got 2"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"values": torch.ones(2), "group_ids": torch.zeros(2, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        pykern.group_statistics(**arguments)
