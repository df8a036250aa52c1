"""risk_advantages and QuantileTracker against their definitions in float64, and against closed forms."""

import io
import math

import pytest
import torch

import pykern
from pykern.reference import policy_risk as reference
from tests.support import assert_accurate, check_op, compile_whole, threads

NAN = float("nan")


def sample(rows: int, dtype=torch.float32):
    """Ragged prompts in ragged bundles, in no order, with negative and huge ids; a prompt may be in two bundles."""
    groups = torch.randint(0, max(rows // 8, 1), (rows,)) * 1_000_000_007 - 5_000_000_000
    bundles = torch.randint(0, max(rows // 40, 1), (rows,)) - 3
    if rows:
        bundles[-1] = torch.iinfo(torch.int64).min
    return torch.randn(rows).to(dtype), groups, bundles


def regular(prompts: int, responses: int, in_bundle: int, dtype=torch.float32):
    """As a trainer has them: equal prompts side by side."""
    rows = torch.arange(prompts * responses)
    rewards = torch.rand(prompts * responses).mul(8).round().div(4).to(dtype)
    return rewards, rows // responses, rows // (responses * in_bundle)


def tracker_at(low: float, high: float) -> pykern.QuantileTracker:
    tracker = pykern.QuantileTracker(device=torch.get_default_device())
    tracker.values[3], tracker.values[15] = low, high
    return tracker


def assert_matches(rewards, groups, bundles, *, tracker=None, **keywords):
    actual, metrics = pykern.risk_advantages(rewards, groups, bundles, tracker=tracker, return_metrics=True, **keywords)
    tracked = None if tracker is None else tracker.quantiles(keywords.get("levels", (0.2, 0.8)))
    exact, papers = reference.risk_advantages(rewards.double(), groups, bundles, tracked=tracked, **keywords)
    assert actual.dtype == (torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    units = 1.0 if actual.dtype == torch.float32 else 1000.0
    assert_accurate(actual, exact, units=units)
    assert_accurate(metrics["scores"], papers, units=units)
    assert metrics["papers"] == papers.isfinite().sum()
    assert metrics["bundles"] == len(bundles[rewards.isfinite()].unique())
    assert metrics["non_finite"] == (~rewards.isfinite()).sum()
    return actual


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("credit", pykern.CREDITS)
@pytest.mark.parametrize("mix, upper_tail", [(1.5, None), (None, None), (None, 0.7)])
def test_matches_definition(mix, upper_tail, credit, dtype):
    keywords = {"mix": mix, "upper_tail": upper_tail, "credit": credit}
    assert_matches(*regular(25, 8, 5, dtype), **keywords)
    assert_matches(*sample(157, dtype), **keywords)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("tracking", pykern.TRACKINGS)
@pytest.mark.parametrize("credit", pykern.CREDITS)
def test_tracked_quantiles(credit, tracking):
    rewards, groups, bundles = regular(15, 8, 5)
    for tracker in (tracker_at(3.0, 6.0), tracker_at(NAN, NAN)):
        assert_matches(rewards, groups, bundles, credit=credit, tracking=tracking, tracker=tracker)
    fresh = pykern.risk_advantages(rewards, groups, bundles, tracker=tracker_at(NAN, NAN), tracking=tracking)
    assert torch.equal(fresh, pykern.risk_advantages(rewards, groups, bundles))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("credit", pykern.CREDITS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17, 700])
def test_sizes(rows, credit):
    assert_matches(*sample(rows), credit=credit, levels=(0.1, 0.9))
    assert_matches(*sample(rows), credit=credit, tracker=tracker_at(-0.5, 0.5), eps=0.1)


@pytest.mark.usefixtures("everywhere")
def test_one_bundle_and_one_prompt():
    rewards, groups, bundles = sample(300)
    assert_matches(rewards, groups, torch.zeros_like(bundles))
    assert_matches(rewards, torch.zeros_like(groups), bundles)
    assert_matches(rewards, torch.arange(300), torch.arange(300) // 7, tracker=tracker_at(-0.5, 0.5))


@pytest.mark.usefixtures("everywhere")
def test_closed_form():
    """Two prompts, papers 0 + 1, 1 + 1, 0 + 2, 3 + 2 (and a response too many): scores 1, 2, 2, 5."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 3.0, 9.0, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    groups, bundles = torch.tensor([0] * 5 + [1] * 4), torch.zeros(9, dtype=torch.int64)
    keywords = {"levels": (1 / 3, 2 / 3), "eps": 0.0, "return_metrics": True}
    deviation = 3**0.5  # of 1, 2, 2, 5
    actual, metrics = pykern.risk_advantages(rewards, groups, bundles, mix=None, **keywords)
    # Both quantiles are 2: only what leaves them counts, on neither side of the clip.
    assert actual.tolist() == [0.0] * 9
    assert metrics["scores"][:4].tolist() == [1.0, 2.0, 2.0, 5.0] and metrics["scores"][4:].isnan().all()
    actual, _ = pykern.risk_advantages(rewards, groups, bundles, mix=1.0, **keywords)
    lower = -1 / (1 / 3) / 2 / deviation
    expected = [lower, 0.0, 0.0, 0.0, 0.0, lower, 0.0, 0.0, 0.0]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
    actual, _ = pykern.risk_advantages(rewards, groups, bundles, mix=None, upper_tail=1.0, **keywords)
    upper = 3 / (1 / 3) / 2 / deviation
    expected = [0.0, 0.0, 0.0, upper, 0.0, 0.0, 0.0, 0.0, upper]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
    actual, _ = pykern.risk_advantages(rewards, groups, bundles, mix=1.0, credit="score", **keywords)
    torch.testing.assert_close(actual[[0, 5]], torch.tensor([1.5, 0.5], dtype=torch.float64) * lower)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("credit", pykern.CREDITS)
@pytest.mark.parametrize("tracked", [False, True])
def test_equal_scores_are_exactly_zero(tracked, credit):
    for tenth in range(1, 10):
        rewards, groups, bundles = regular(10, 7, 5)
        rewards[:35] = tenth / 10
        keywords = {"credit": credit, "tracker": tracker_at(0.1, 4.0) if tracked else None}
        actual = pykern.risk_advantages(rewards, groups, bundles, **keywords)
        assert torch.count_nonzero(actual[:35]) == 0
        assert torch.count_nonzero(actual[35:]) > 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("credit", pykern.CREDITS)
def test_non_finite_reward_leaves_only_its_row_out(credit, bad):
    rewards, groups, bundles = sample(120)
    keep = torch.ones(120, dtype=torch.bool)
    keep[[0, 3, 77]] = False
    rewards[~keep] = bad
    actual = assert_matches(rewards, groups, bundles, credit=credit)
    assert torch.count_nonzero(actual[~keep]) == 0
    assert torch.equal(actual[keep], pykern.risk_advantages(rewards[keep], groups[keep], bundles[keep], credit=credit))
    lost = assert_matches(torch.full((6,), bad), torch.arange(6) % 2, torch.zeros(6, dtype=torch.int64))
    assert lost.tolist() == [0.0] * 6


@pytest.mark.usefixtures("everywhere")
def test_types_strides_and_repeats_agree():
    rewards, groups, bundles = regular(30, 6, 5)
    straight = pykern.risk_advantages(rewards, groups, bundles)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(straight, pykern.risk_advantages(rewards, groups.to(dtype), bundles.to(dtype)))
    spread = torch.stack([rewards, torch.full_like(rewards, NAN)], dim=1)[:, 0]
    twice = (torch.stack([ids, ids + 1], dim=1)[:, 0] for ids in (groups, bundles))
    assert torch.equal(straight, pykern.risk_advantages(spread, *twice))
    assert torch.equal(straight, pykern.risk_advantages(rewards, groups, bundles))
    with threads(1):
        assert torch.equal(straight, pykern.risk_advantages(rewards, groups, bundles))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("tracked", [False, True])
def test_opcheck(tracked):
    rewards, groups, bundles = regular(6, 4, 3)
    quantiles = torch.tensor([0.1, 3.0], dtype=torch.float64) if tracked else None
    # Scores stand at a bundle's first prompt alone, NaN elsewhere; with one prompt they stand at every row.
    arguments = (rewards[:4], groups[:4], bundles[:4], quantiles, 0.2, 0.8, 1.5, 0.0, False, 3, 1e-6)
    check_op(torch.ops.pykern.risk_advantages.default, arguments)


def test_compiles_whole_and_is_constant():
    rewards, groups, bundles = regular(10, 6, 5)
    tracker = tracker_at(1.0, 5.0)
    call = lambda rewards: pykern.risk_advantages(rewards, groups, bundles, tracker=tracker)  # noqa: E731
    assert torch.equal(compile_whole(call)(rewards), call(rewards))
    assert not call(rewards.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rewards": [1.0]}, TypeError, "rewards: expected a floating-point tensor, got list"),
        ({"rewards": torch.ones(2, 2)}, ValueError, r"rewards: .* \[N\], got \[2, 2\]"),
        ({"group_ids": torch.zeros(4)}, TypeError, "group_ids: .* got torch.float32"),
        ({"bundle_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"bundle_ids: .* \[4\], got \[3\]"),
        ({"bundle_ids": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "bundle_ids: .* got meta"),
        ({"levels": 0.5}, ValueError, r"levels: expected 2 numbers, \(a, b\), got 0.5"),
        ({"tracker": torch.ones(2)}, TypeError, "tracker: expected a QuantileTracker or None, got torch.float32"),
        ({"levels": (0.8, 0.2)}, ValueError, r"levels: .* got \(0.8, 0.2\)"),
        ({"mix": 0.0}, ValueError, "mix: expected a positive weight or None, got 0.0"),
        ({"upper_tail": 1.0}, ValueError, "upper_tail: expected one of mix and upper_tail"),
        ({"tracking": "batch"}, ValueError, "tracking: expected one of mix, track, got 'batch'"),
        ({"credit": "sum"}, ValueError, "credit: expected one of uniform, .* got 'sum'"),
        ({"eps": -1.0}, ValueError, "eps: .* got -1.0"),
        (
            {"tracker": pykern.QuantileTracker(device="meta")},
            ValueError,
            "tracker: expected the device .* cpu, got meta",
        ),
    ],
)
def test_refuses(change, error, message):
    arguments = {name: torch.zeros(4, dtype=torch.int64) for name in ("group_ids", "bundle_ids")}
    arguments = {"rewards": torch.ones(4)} | arguments | change
    positional = [arguments.pop(name) for name in ("rewards", "group_ids", "bundle_ids")]
    with pytest.raises(error, match=message):
        pykern.risk_advantages(*positional, **arguments)


@pytest.mark.usefixtures("everywhere")
def test_tracker_follows_the_quantiles():
    tracker = pykern.QuantileTracker(lr=0.05, device=torch.get_default_device())
    levels = torch.tensor([step / 20 for step in range(1, 20)], dtype=torch.float64)
    tracker.update(torch.empty(0))
    tracker.update(torch.full((7,), NAN))
    assert tracker.values.isnan().all()
    expected = None
    for _ in range(6):
        scores = torch.randn(31, dtype=torch.float64)
        holes = torch.cat([scores, torch.full((9,), NAN, dtype=torch.float64)])[torch.randperm(40)]
        tracker.update(holes)
        if expected is None:
            expected = scores.quantile(levels)
        else:
            expected = expected + 0.05 * (levels - (scores < expected[:, None]).double().mean(1))
        torch.testing.assert_close(tracker.values, expected, rtol=1e-12, atol=1e-12)
    before = tracker.values.clone()
    tracker.update(torch.full((7,), NAN))
    assert torch.equal(tracker.values, before)
    assert torch.equal(tracker.quantiles((0.21, 0.88)), torch.stack([before[3], before[17]]))


@pytest.mark.usefixtures("everywhere")
def test_tracker_moves_the_next_step_along():
    tracker = pykern.QuantileTracker(device=torch.get_default_device())
    for _ in range(3):
        batch = regular(20, 6, 5)
        _, metrics = pykern.risk_advantages(*batch, tracker=tracker, return_metrics=True)
        assert_matches(*batch, tracker=tracker)
        tracker.update(metrics["scores"])
        assert tracker.values.isfinite().all()


def test_tracker_survives_a_checkpoint():
    tracker = pykern.QuantileTracker()
    tracker.update(torch.randn(50))
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    again = pykern.QuantileTracker()
    again.load_state_dict(torch.load(file, weights_only=True))
    scores = torch.randn(20)
    saved = tracker.state_dict()["values"]
    for each in (tracker, again):
        each.update(scores)
    assert torch.equal(tracker.values, again.values) and not torch.equal(tracker.values, saved)


def test_tracker_refuses():
    with pytest.raises(ValueError, match="levels: expected numbers from 0 to 1, got"):
        pykern.QuantileTracker((0.2, 1.5))
    with pytest.raises(ValueError, match="lr: expected a positive number, got 0"):
        pykern.QuantileTracker(lr=0)
    with pytest.raises(TypeError, match="scores: expected a floating-point tensor, got list"):
        pykern.QuantileTracker().update([1.0])
    with pytest.raises(ValueError, match="scores: expected the device of the tracker, cpu, got meta"):
        pykern.QuantileTracker().update(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"state: expected 19 values, got \[2\]"):
        pykern.QuantileTracker().load_state_dict({"values": torch.ones(2)})
    with pytest.raises(ValueError, match="state: expected that of a QuantileTracker, got the keys step"):
        pykern.QuantileTracker().load_state_dict({"step": torch.ones(2)})
