"""masked_whiten against its definition in float64."""

import math

import pytest
import torch

import pykern
from pykern.reference import policy_returns as reference
from tests.support import assert_accurate, check_op, compile_whole, threads

NAN = float("nan")


def sample(*shape: int, dtype=torch.float32):
    """Values of which the masked ones are garbage."""
    kept = torch.rand(shape) < 0.7
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)[torch.randint(0, 3, shape)]
    return torch.where(kept, torch.randn(shape).to(dtype) * 2 + 3, garbage), kept


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (2,), (3, 1), (5, 37), (3, 2, 11), (2, 9000), (40_003,)])
@pytest.mark.parametrize("keywords", [{}, {"shift_mean": False, "eps": 0.1}, {"ddof": 0}])
def test_matches_definition(shape, dtype, keywords):
    values, kept = sample(*shape, dtype=dtype)
    # In float64 nothing is more exact than the definition, whose own sum is off by some roundings, most on one thread.
    units = 1.0 if dtype != torch.float64 else 400.0
    for mask in (kept, kept.to(torch.uint8)):
        actual = pykern.masked_whiten(values, mask, **keywords)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_accurate(actual, reference.masked_whiten(values.double(), kept, **keywords), units=units)
        assert torch.count_nonzero(actual[~kept]) == 0
    values = values.nan_to_num(1.0, 2.0, 0.5)
    exact = reference.masked_whiten(values.double(), **keywords)
    assert_accurate(pykern.masked_whiten(values, **keywords), exact, units=units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_definition_at_every_level(cpu_level, dtype):
    for size in (1, 2, 3, 7, 8, 9, 31, 33, 1000, 17_000):
        values, kept = sample(size, dtype=dtype)
        exact = reference.masked_whiten(values.double(), kept)
        assert_accurate(pykern.masked_whiten(values, kept), exact, units=1.0 if dtype == torch.float32 else 200.0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("count", [1, 2, 3, 17, 5000])
def test_equal_values_are_exactly_zero(count):
    for tenth in range(1, 10):
        values = torch.full((count + 2,), tenth / 10)
        values[:2] = NAN
        mask = torch.arange(count + 2) > 1
        assert pykern.masked_whiten(values, mask).tolist() == [0.0] * (count + 2)
        kept = pykern.masked_whiten(values, mask, shift_mean=False)
        assert torch.equal(kept[2:], values[2:]) and kept[:2].tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("everywhere")
def test_no_token_counts():
    values = torch.full((3, 50), NAN)
    assert pykern.masked_whiten(values, torch.zeros(3, 50)).tolist() == torch.zeros(3, 50).tolist()


@pytest.mark.usefixtures("everywhere")
def test_large_offset_keeps_the_spread():
    spread = torch.randn(30_000, dtype=torch.float64)
    whitened = pykern.masked_whiten(spread + 1e7, eps=0.0)
    torch.testing.assert_close(whitened, (spread - spread.mean()) / spread.std(), rtol=1e-7, atol=1e-7)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("equal", [False, True])
def test_non_finite_values_do_not_hide(bad, equal):
    values = torch.ones(500) if equal else torch.randn(500)
    values[217] = bad
    assert not pykern.masked_whiten(values).isfinite().any()


@pytest.mark.usefixtures("everywhere")
def test_strides_alignment_and_repeats_agree():
    values, kept = sample(3, 20_001)
    straight = pykern.masked_whiten(values, kept)
    space = torch.empty(values.numel() + 1)[1:].view(values.shape).copy_(values)
    torch.testing.assert_close(pykern.masked_whiten(space, kept), straight, rtol=0, atol=0)
    turned = values.t().contiguous().t()
    assert torch.equal(pykern.masked_whiten(turned, kept), straight)
    assert torch.equal(pykern.masked_whiten(values, kept), straight)
    with threads(1):
        assert torch.equal(pykern.masked_whiten(values, kept), straight)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    values, kept = sample(3, 40) if masked else (torch.randn(3, 40), None)
    check_op(torch.ops.pykern.masked_whiten.default, (values, kept, True, 1e-8, 1))


def test_compiles_whole_and_is_constant():
    values, kept = sample(3, 40)
    call = lambda values: pykern.masked_whiten(values, kept)  # noqa: E731
    assert torch.equal(compile_whole(call)(values), call(values))
    assert not call(values.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"values": [1.0]}, TypeError, "values: expected a floating-point tensor, got list"),
        ({"mask": True}, TypeError, "mask: expected a tensor, got bool"),
        ({"mask": torch.ones(3)}, ValueError, r"mask: expected the shape of values, \[2\], got \[3\]"),
        ({"mask": torch.ones(2, device="meta")}, ValueError, "mask: expected the device of values, cpu, got meta"),
        ({"eps": -1.0}, ValueError, "eps: .* got -1.0"),
        ({"ddof": 2}, ValueError, "ddof: expected 0 or 1, got 2"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"values": torch.ones(2)} | change
    with pytest.raises(error, match=message):
        pykern.masked_whiten(arguments.pop("values"), **arguments)
