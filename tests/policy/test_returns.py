"""discounted_returns and gae against their definitions in float64, and against closed forms."""

import math

import pytest
import torch

import pykern
from pykern.reference import policy_returns as reference
from tests.support import assert_accurate, check_op, compile_whole, threads

NAN = float("nan")


def batch(rows: int, columns: int, dtype=torch.float32, mask: str = "holes"):
    """Rewards, values and a mask; masked places hold garbage. One row is masked whole."""
    rewards, values = (torch.randn(rows, columns).to(dtype) for _ in range(2))
    kept = torch.ones(rows, columns, dtype=torch.bool)
    if mask == "holes":
        kept = torch.rand(rows, columns) < 0.7
    elif mask == "tail":
        kept = torch.arange(columns) < torch.randint(0, columns + 1, (rows, 1))
    elif mask == "turns":
        kept = torch.rand(rows, columns // 40 + 1).gt(0.5).repeat_interleave(40, dim=1)[:, :columns]
    if rows > 1 and mask != "none":
        kept[1] = False
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)[torch.randint(0, 3, kept.shape)]
    return torch.where(kept, rewards, garbage), torch.where(kept, values, garbage), kept


def packed(lengths: list[int], dtype=torch.float32):
    total = sum(lengths)
    rewards, values, mask = (tensor[0] for tensor in batch(1, total, dtype))
    return rewards, values, mask, torch.tensor([0, *lengths]).cumsum(0)


def assert_gae(rewards, values, **keywords):
    """Both scans are held to the definition."""
    lam = keywords.pop("lam", 0.9)
    wide = rewards.double(), values.double()
    exact = reference.gae(*wide, lam=lam, **keywords)
    for got, want in zip(pykern.gae(rewards, values, lam=lam, **keywords), exact):
        # Running values are doubles: only the result is rounded. In float64, sums of thousands of tokens may differ.
        assert got.dtype == (torch.float64 if rewards.dtype == torch.float64 else torch.float32)
        assert_accurate(got, want, units=0.6 if got.dtype == torch.float32 else 100.0)
    got = pykern.discounted_returns(rewards, **keywords)
    assert_accurate(
        got, reference.discounted_returns(wide[0], **keywords), units=0.6 if got.dtype == torch.float32 else 100.0
    )


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("carry", pykern.CARRIES)
@pytest.mark.parametrize("mask", ["none", "holes", "tail", "turns"])
def test_matches_definition(mask, carry, dtype):
    rewards, values, kept = batch(19, 131, dtype, mask)
    assert_gae(rewards, values, gamma=0.97, mask=None if mask == "none" else kept, carry=carry)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "rows, columns", [(0, 0), (0, 5), (3, 0), (1, 1), (2, 1), (1, 2), (16, 16), (17, 33), (5, 127)]
)
def test_sizes(rows, columns):
    rewards, values, kept = batch(rows, columns)
    assert_gae(rewards, values, gamma=0.9, mask=kept)
    assert_gae(rewards, values, gamma=0.9, mask=kept, carry="decay")


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("carry", pykern.CARRIES)
def test_packed(carry, dtype):
    rewards, values, kept, cu_seqlens = packed([0, 1, 3, 130, 0, 17, 64, 2, 1000, 0], dtype)
    assert_gae(rewards, values, gamma=0.95, mask=kept, cu_seqlens=cu_seqlens, carry=carry)
    assert_gae(*(tensor.nan_to_num(0.5, 1.0, 2.0) for tensor in (rewards, values)), cu_seqlens=cu_seqlens.int())


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1] * 40])
def test_packed_sizes(lengths):
    rewards, values = torch.randn(sum(lengths)), torch.randn(sum(lengths))
    assert_gae(rewards, values, gamma=0.5, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("mask, carry", [("none", "through"), ("holes", "through"), ("holes", "decay")])
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.999, 0.95)])
def test_long_sequences_in_parts(gamma, lam, mask, carry):
    """Longer than what one task takes on the CPU, and than what one block takes where there are few sequences."""
    rewards, values, kept = batch(2, 20_001, torch.float64, mask)
    if mask == "holes":
        kept[0, 7_000:17_500] = False  # whole parts without a token that counts
        rewards[0, 7_000:17_500] = NAN
    assert_gae(rewards, values, gamma=gamma, lam=lam, mask=None if mask == "none" else kept, carry=carry)


@pytest.mark.usefixtures("everywhere")
def test_long_packed_sequence_among_short_ones():
    rewards, values, kept, cu_seqlens = packed([5, 0, 18_000, 1, 700])
    assert_gae(rewards, values, gamma=0.99, mask=kept, cu_seqlens=cu_seqlens)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("gamma, lam", [(0.0, 0.9), (0.9, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("carry", pykern.CARRIES)
def test_border_discounts(gamma, lam, carry):
    rewards, values, kept = batch(6, 90)
    assert_gae(rewards, values, gamma=gamma, lam=lam, mask=kept, carry=carry)


@pytest.mark.usefixtures("everywhere")
def test_lambda_of_each_sequence():
    rewards, values, kept = batch(21, 70)
    lam = pykern.length_adaptive_lambda(kept.sum(1))
    assert lam.min() == 0 and 0.5 < lam.max() < 1
    assert_gae(rewards, values, gamma=0.99, lam=lam, mask=kept)
    assert_gae(rewards, values, gamma=0.99, lam=torch.full_like(lam, 0.7), mask=kept)
    uniform = pykern.gae(rewards, values, lam=torch.full_like(lam, 0.7), mask=kept)
    for got, want in zip(uniform, pykern.gae(rewards, values, lam=0.7, mask=kept)):
        assert torch.equal(got, want)
    rewards, values, kept, cu_seqlens = packed([4, 90, 0, 33])
    assert_gae(rewards, values, lam=torch.rand(4).double(), mask=kept, cu_seqlens=cu_seqlens)


def test_length_adaptive_lambda():
    lam = pykern.length_adaptive_lambda(torch.tensor([0, 1, 20, 40, 200]), alpha=0.05)
    torch.testing.assert_close(lam, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.9], dtype=torch.float64))


@pytest.mark.usefixtures("everywhere")
def test_closed_forms():
    rewards, values = torch.randn(4, 50, dtype=torch.float64), torch.randn(4, 50, dtype=torch.float64)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(pykern.discounted_returns(rewards), to_go)
    advantages, returns = pykern.gae(rewards, values)
    torch.testing.assert_close(advantages, to_go - values)
    torch.testing.assert_close(returns, to_go)
    behind = torch.cat([values[:, 1:], torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(pykern.gae(rewards, values, gamma=0.9, lam=0.0)[0], rewards + 0.9 * behind - values)
    one_at_the_end = torch.zeros(1, 300, dtype=torch.float64)
    one_at_the_end[0, -1] = 1
    powers = 0.9 ** torch.arange(299, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(pykern.discounted_returns(one_at_the_end, gamma=0.9)[0], powers)


@pytest.mark.usefixtures("everywhere")
def test_carries_differ_by_the_discount_of_masked_tokens():
    rewards, mask = torch.tensor([[1.0, 7.0, 7.0, 2.0]]), torch.tensor([[1, 0, 0, 1]])
    through = pykern.discounted_returns(rewards, gamma=0.5, mask=mask)
    assert through.tolist() == [[2.0, 0.0, 0.0, 2.0]]
    decay = pykern.discounted_returns(rewards, gamma=0.5, mask=mask, carry="decay")
    assert decay.tolist() == [[1.25, 0.0, 0.0, 2.0]]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("mask", ["holes", "turns"])
def test_packed_equals_padded_without_masked_tokens(mask):
    rewards, values, kept = batch(9, 140, torch.float64, mask)
    lengths = kept.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    padded = pykern.gae(rewards, values, gamma=0.9, lam=0.8, mask=kept)
    for got, want in zip(pykern.gae(rewards[kept], values[kept], gamma=0.9, lam=0.8, cu_seqlens=cu_seqlens), padded):
        torch.testing.assert_close(got, want[kept], rtol=1e-12, atol=1e-12)
        assert torch.count_nonzero(want[~kept]) == 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("columns", [70, 9000])
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_non_finite_value_stays_in_its_sequence(bad, columns):
    rewards, values, kept = batch(5, columns, mask="tail")
    kept[3] = True
    rewards[3], values[3] = torch.randn(columns), torch.randn(columns)
    clean = pykern.gae(rewards, values, gamma=0.9, mask=kept)
    at = columns - 20
    rewards[3, at] = bad
    for got, want in zip(pykern.gae(rewards, values, gamma=0.9, mask=kept), clean):
        assert not got[3, : at + 1].isfinite().any()
        got[3, : at + 1] = want[3, : at + 1]
        assert torch.equal(got, want)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("columns", [200, 18_000])
def test_strides_types_alignment_and_repeats_agree(columns):
    rewards, values, kept = batch(3, columns)
    straight = pykern.gae(rewards, values, gamma=0.99, lam=0.9, mask=kept)
    wide = torch.full((3, columns + 1), NAN)
    wide[:, 1:] = rewards
    turned = values.t().contiguous().t()
    space = torch.empty(3 * columns + 1)[1:].view(3, columns)
    others = (
        (wide[:, 1:], turned, kept),
        (rewards, values, kept.float() * 0.5),
        (space.copy_(rewards), values, kept),
        (rewards, values, kept),
    )
    for changed in others:
        again = pykern.gae(changed[0], changed[1], gamma=0.99, lam=0.9, mask=changed[2])
        assert all(torch.equal(got, want) for got, want in zip(again, straight))
    with threads(1):
        again = pykern.gae(rewards, values, gamma=0.99, lam=0.9, mask=kept)
    assert all(torch.equal(got, want) for got, want in zip(again, straight))


@pytest.mark.usefixtures("everywhere")
def test_whitened_advantages():
    rewards, values, kept = batch(7, 90)
    plain, returns = pykern.gae(rewards, values, gamma=0.9, mask=kept)
    whitened, same = pykern.gae(rewards, values, gamma=0.9, mask=kept, whiten=True)
    assert torch.equal(returns, same)
    assert torch.equal(whitened, pykern.masked_whiten(plain, kept))


def test_results_are_constants():
    rewards, values = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    assert not any(result.requires_grad for result in pykern.gae(rewards, values))
    assert not pykern.discounted_returns(rewards).requires_grad


@pytest.mark.usefixtures("everywhere")
def test_types_of_results():
    narrow, wide = torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(2, 3, dtype=torch.float64)
    assert pykern.gae(narrow, narrow)[0].dtype == torch.float32
    assert pykern.gae(narrow, wide)[0].dtype == torch.float64
    assert pykern.discounted_returns(wide).dtype == torch.float64


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("kind", ["returns", "gae", "packed"])
def test_opcheck(kind):
    rewards, values, kept = batch(3, 40)
    if kind == "packed":
        cu_seqlens = torch.tensor([0, 50, 120])
        tensors = (rewards.flatten(), values.flatten(), kept.flatten(), cu_seqlens, torch.rand(2).double())
    else:
        tensors = (rewards, None if kind == "returns" else values, kept, None, None)
    check_op(torch.ops.pykern.discounted_scan.default, (*tensors, 0.9, 0.8, False))


@pytest.mark.usefixtures("everywhere")
def test_compiles_whole():
    rewards, values, kept = batch(3, 40)
    call = lambda rewards: pykern.gae(rewards, values, gamma=0.9, mask=kept, whiten=True)  # noqa: E731
    assert all(torch.equal(got, want) for got, want in zip(compile_whole(call)(rewards), call(rewards)))
    call = lambda rewards: pykern.discounted_returns(rewards, gamma=0.9, mask=kept)  # noqa: E731
    assert torch.equal(compile_whole(call)(rewards), call(rewards))


@pytest.mark.parametrize("offsets", [[0, 60, 60, 999], [-7, 20, 100], [50, 20, 0]])
def test_wrong_offsets_touch_no_other_memory(offsets, device):
    """Only the CPU's code can look at the offsets without waiting; a kernel keeps to its tensors all the same."""
    rewards = torch.randn(100, device=device)
    try:
        pykern.gae(rewards, rewards, cu_seqlens=torch.tensor(offsets, device=device))
    except RuntimeError as error:
        assert "cu_seqlens: expected" in str(error)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rewards": [1.0]}, TypeError, "rewards: expected a floating-point tensor, got list"),
        ({"rewards": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "rewards: .* got torch.int64"),
        ({"rewards": torch.ones(6)}, ValueError, r"rewards: expected \[B, T\], got \[6\]; packed"),
        ({"values": 1.0}, TypeError, "values: expected a floating-point tensor, got float"),
        ({"values": torch.ones(2, 4)}, ValueError, r"values: .* \[2, 3\], got \[2, 4\]"),
        ({"values": torch.ones(2, 3, device="meta")}, ValueError, "values: expected the device of rewards, cpu"),
        ({"gamma": 1.5}, ValueError, "gamma: expected a number from 0 to 1, got 1.5"),
        ({"gamma": NAN}, ValueError, "gamma: expected a number from 0 to 1, got nan"),
        ({"lam": -0.1}, ValueError, "lam: expected a number from 0 to 1, got -0.1"),
        ({"lam": torch.ones(3)}, ValueError, r"lam: expected one per sequence, \[2\], got \[3\]"),
        ({"lam": torch.ones(2, dtype=torch.int64)}, TypeError, "lam: .* got torch.int64"),
        ({"lam": torch.tensor(0.5)}, ValueError, "lam: .* without dimensions"),
        ({"carry": "reset"}, ValueError, "carry: expected one of through, decay, got 'reset'"),
        ({"mask": 1}, TypeError, "mask: expected a tensor, got int"),
        ({"mask": torch.ones(3, 2)}, ValueError, r"mask: .* \[2, 3\], got \[3, 2\]"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"cu_seqlens: .* \[2\] beside \[2, 3\]; padded"),
        (
            {"cu_seqlens": torch.tensor([0.0])},
            TypeError,
            "cu_seqlens: expected a tensor of integers, got torch.float32",
        ),
    ],
)
def test_refuses(change, error, message):
    arguments = {"rewards": torch.ones(2, 3), "values": torch.ones(2, 3)} | change
    with pytest.raises(error, match=message):
        pykern.gae(arguments.pop("rewards"), arguments.pop("values"), **arguments)


@pytest.mark.parametrize("offsets", [[0, 7], [1, 6], [0, 4, 2, 6]])
def test_refuses_offsets_on_the_cpu(offsets):
    with pytest.raises(RuntimeError, match="cu_seqlens: expected"):
        pykern.discounted_returns(torch.ones(6), cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize(
    "lengths, alpha, error, message",
    [
        (torch.ones(2), 0.1, TypeError, "lengths: expected a tensor of integers"),
        (torch.ones(2, 2, dtype=torch.int64), 0.1, ValueError, "lengths: expected one per sequence"),
        (torch.ones(2, dtype=torch.int64), 0.0, ValueError, "alpha: expected a positive number, got 0.0"),
    ],
)
def test_length_adaptive_lambda_refuses(lengths, alpha, error, message):
    with pytest.raises(error, match=message):
        pykern.length_adaptive_lambda(lengths, alpha)
