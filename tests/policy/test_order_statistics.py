"""Quantiles, shares and moments of masked tokens against their definition."""

import math

import pytest
import torch

import pykern
from pykern.policy.order_statistics import INTERPOLATIONS, ORDERS
from pykern.reference import policy_selection as reference
from tests.support import assert_accurate, check_op, compile_whole, threads

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tokens(*sizes, dtype=torch.float32, kind="normal"):
    """Values and a mask under which they hold garbage."""
    values = torch.randn(*sizes, dtype=torch.float64)
    if kind == "few values":
        values = values.round()  # many ties, and zeros of both signs
    if kind == "magnitudes":
        values = values * 10.0 ** torch.randint(-30, 30, sizes).double()
    mask = torch.rand(sizes) < 0.7
    garbage = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(0, 3, sizes)].double()
    return torch.where(mask, values, garbage).to(dtype), mask


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("kind", ["normal", "few values", "magnitudes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantile(dtype, kind, interpolation):
    values, mask = tokens(7, 93, dtype=dtype, kind=kind)
    quantiles = [0.0, 0.2, 0.5, 1 / 3, 0.8, 0.99, 1.0]
    actual = pykern.masked_quantile(values, quantiles, mask, interpolation=interpolation)
    exact = torch.stack([reference.masked_quantile(values.double(), q, mask, interpolation) for q in quantiles])
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
    for q, expected in zip(quantiles, actual):
        assert torch.equal(pykern.masked_quantile(values, q, mask, interpolation=interpolation), expected)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 257, 5000])
def test_quantile_of_all_is_torch_quantile(size, interpolation):
    values = torch.randn(size, dtype=torch.float64)
    for q in (0.0, 0.25, 0.8, 1.0):
        actual = pykern.masked_quantile(values, q, interpolation=interpolation)
        torch.testing.assert_close(actual, values.quantile(q, interpolation=interpolation), rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("everywhere")
def test_quantile_next_to_ties():
    values = torch.tensor([1.0, 1.0, 1.0, 4.0])
    assert pykern.masked_quantile(values, [0.5, 2 / 3, 0.75, 1.0]).tolist() == [1.0, 1.0, 1.75, 4.0]


@pytest.mark.usefixtures("everywhere")
def test_quantile_of_infinities():
    values = torch.tensor([-math.inf, 0.0, math.inf])
    assert pykern.masked_quantile(values, [0.0, 0.25, 0.5, 0.75]).tolist() == [-math.inf, -math.inf, 0.0, math.inf]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_quantile_of_nothing_and_of_nan(interpolation):
    values = torch.tensor([1.0, math.nan, 3.0])
    quantile = lambda mask: pykern.masked_quantile(values, 0.5, torch.tensor(mask), interpolation=interpolation)  # noqa: E731
    assert quantile([False] * 3).isnan()
    assert quantile([True] * 3).isnan()
    assert quantile([True, False, False]) == 1.0
    assert pykern.masked_quantile(torch.empty(0), [0.1, 0.9], interpolation=interpolation).isnan().all()
    assert pykern.masked_quantile(values, []).shape == (0,)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["normal", "few values", "magnitudes"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_share(dtype, kind, order):
    values, mask = tokens(5, 211, dtype=dtype, kind=kind)
    candidates = torch.rand(5, 211) < 0.5
    for share, minimum, allowed in ((0.0, 1, None), (0.2, 0, None), (0.2, 3, candidates), (0.9, 0, candidates)):
        keywords = {"order": order, "minimum": minimum, "candidates": allowed, "seed": 77}
        selected, counts = pykern.share_mask(values, share, mask, return_counts=True, **keywords)
        assert torch.equal(selected, reference.share_mask(values.double(), share, mask, **keywords))
        assert counts.tolist() == [int(selected.sum()), int(mask.sum())]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 4000])
def test_share_of_equal_values_are_the_first(size, order):
    values = torch.where(torch.arange(size) % 2 == 0, 0.0, -0.0)
    selected = pykern.share_mask(values, 0.5, order=order)
    assert torch.equal(selected, torch.arange(size) < size // 2)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [0, 1, 2])
def test_share_sizes(size, order):
    values = torch.randn(size)
    selected, counts = pykern.share_mask(values, 1.0, order=order, return_counts=True)
    assert selected.tolist() == [True] * size and counts.tolist() == [size, size]
    selected, counts = pykern.share_mask(values, 0.0, order=order, minimum=1, return_counts=True)
    assert int(selected.sum()) == counts[0] == min(size, 1)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_nan_is_never_selected_but_counts(order):
    values = torch.tensor([math.nan, 1.0, math.nan, 2.0])
    selected, counts = pykern.share_mask(values, 0.75, order=order, return_counts=True)
    assert selected.tolist() == [False, True, False, True] and counts.tolist() == [2, 4]


@pytest.mark.usefixtures("everywhere")
def test_random_share_is_fair_and_follows_its_seed():
    values, hits = torch.zeros(64), torch.zeros(64)
    for seed in range(200):
        selected = pykern.share_mask(values, 0.25, order="random", seed=seed)
        assert selected.sum() == 16
        hits += selected
    assert torch.equal(selected, pykern.share_mask(values, 0.25, order="random", seed=199))
    assert hits.min() > 25 and hits.max() < 75  # four standard deviations about 50


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [(0,), (1,), (3, 5, 7), (20001,)])
def test_moments(sizes, dtype):
    values, mask = tokens(*sizes, dtype=dtype)
    centre = torch.tensor(0.5)
    kept = values[mask].double()
    count, mean, square, smallest, largest = pykern.masked_moments(values, mask, centre=centre)
    assert count == len(kept)
    if len(kept) == 0:
        assert [mean, square, smallest, largest] == [0, 0, math.inf, -math.inf]
        return
    assert_accurate(torch.stack([mean, square]), torch.stack([kept.mean(), (kept - 0.5).square().mean()]), units=200.0)
    assert smallest == kept.min() and largest == kept.max()


@pytest.mark.usefixtures("everywhere")
def test_strides_masks_repeats_and_threads_agree():
    values, mask = tokens(300, 211)
    calls = [
        lambda v, m: pykern.masked_quantile(v, 0.37, m),
        lambda v, m: pykern.share_mask(v, 0.37, m),
        lambda v, m: pykern.masked_moments(v, m),
    ]
    for call in calls:
        straight = call(values, mask)
        assert torch.equal(straight, call(values, mask.to(torch.int64)))
        assert torch.equal(straight, call(values.t().contiguous().t(), mask.t().contiguous().t()))
        with threads(1):
            assert torch.equal(straight, call(values, mask))


def test_results_are_constants():
    values = torch.randn(9, requires_grad=True)
    results = (pykern.masked_quantile(values, 0.5), pykern.share_mask(values, 0.5), pykern.masked_moments(values))
    assert not any(result.requires_grad for result in results)


@pytest.mark.usefixtures("everywhere")
def test_opcheck():
    values, mask = torch.randn(4, 33), torch.rand(4, 33) < 0.7
    check_op(torch.ops.pykern.masked_quantile.default, (values, mask, [0.2, 0.9], 0))
    check_op(torch.ops.pykern.masked_select_share.default, (values, mask, None, 0, 0.2, 1, 0))
    check_op(torch.ops.pykern.masked_moments.default, (values.double(), None, torch.zeros((), dtype=torch.float64)))


@pytest.mark.usefixtures("everywhere")
def test_compiles_whole():
    values, mask = tokens(4, 33)

    def call(values):
        selected, counts = pykern.share_mask(values, 0.3, mask, return_counts=True)
        return pykern.masked_quantile(values, 0.3, mask), selected, counts, pykern.masked_moments(values, mask)

    for compiled, direct in zip(compile_whole(call)(values), call(values)):
        assert torch.equal(compiled, direct)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda v: pykern.masked_quantile([1.0], 0.5), TypeError, "values: .* got list"),
        (lambda v: pykern.masked_quantile(v.int(), 0.5), TypeError, "values: .* got torch.int32"),
        (lambda v: pykern.masked_quantile(v, torch.ones(2)), TypeError, "q: .* got torch.float32; pass q.tolist"),
        (lambda v: pykern.masked_quantile(v, 1.5), ValueError, "q: expected numbers from 0 to 1, got 1.5"),
        (lambda v: pykern.masked_quantile(v, 0.5, v[:2]), ValueError, r"mask: .* \[4\], got \[2\]"),
        (lambda v: pykern.masked_quantile(v, 0.5, [1]), TypeError, "mask: expected a tensor, got list"),
        (lambda v: pykern.masked_quantile(v, 0.5, interpolation="mid"), ValueError, "interpolation: .* got 'mid'"),
        (lambda v: pykern.share_mask(v, -0.1), ValueError, "share: .* got -0.1"),
        (lambda v: pykern.share_mask(v, 0.1, order="top"), ValueError, "order: .* got 'top'"),
        (lambda v: pykern.share_mask(v, 0.1, minimum=-1), ValueError, "minimum: .* got -1"),
        (lambda v: pykern.share_mask(v, 0.1, candidates=v[:1]), ValueError, "candidates: expected the shape"),
        (lambda v: pykern.masked_moments(v, centre=v), ValueError, "centre: expected a tensor of one element"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(4))
