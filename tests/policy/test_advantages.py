"""group_advantages against its definition in float64 and against closed forms."""

import pytest
import torch

import pykern
from pykern.policy.advantages import PRESETS
from pykern.reference import policy_advantages as reference
from tests.support import assert_accurate, check_op, compile_whole, threads

ESTIMATORS = list(pykern.ESTIMATORS)
GROUPED = [name for name, row in pykern.ESTIMATORS.items() if row.baseline not in ("none", "given")]


def extras(name: str, rows: int, dtype=torch.float32) -> dict:
    """The inputs that an estimator needs beside rewards and ids."""
    row = pykern.ESTIMATORS[name]
    keywords = {}
    if row.baseline == "length_weighted" or row.scale == "token_whiten":
        keywords["lengths"] = torch.randint(1, 40, (rows,))
    if row.baseline == "given":
        keywords["baseline_rewards"] = torch.rand(rows).to(dtype)
    return keywords


def exact(name: str, rewards, ids, preset=None, **keywords):
    """The definition in float64, with a preset's numbers."""
    row, numbers = pykern.ESTIMATORS[name], PRESETS[preset]
    keywords.setdefault("eps", numbers.variance_eps if row.scale == "token_whiten" else numbers.std_eps)
    keywords.setdefault("ddof", numbers.ddof)
    keywords.setdefault("singleton", numbers.singleton)
    if "baseline_rewards" in keywords:
        keywords["baseline_rewards"] = keywords["baseline_rewards"].double()
    return reference.group_advantages(rewards.double(), ids, baseline=row.baseline, scale=row.scale, **keywords)


def sample(rows: int, dtype=torch.float32):
    """Ragged groups with negative and huge ids in no order; the last id occurs once."""
    ids = torch.randint(0, max(rows // 6, 1), (rows,)) * 1_000_000_007 - 5_000_000_000
    if rows:
        ids[-1] = torch.iinfo(torch.int64).min
    return torch.randn(rows).to(dtype), ids


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", [None, "verl", "trl"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_matches_definition(name, preset, dtype):
    rewards, ids = sample(157, dtype)
    keywords = extras(name, 157, dtype)
    actual = pykern.group_advantages(rewards, ids, estimator=name, preset=preset, **keywords)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_accurate(
        actual, exact(name, rewards, ids, preset, **keywords), units=1.0 if dtype != torch.float64 else 50.0
    )


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("singleton", ["zero", "self"])
@pytest.mark.parametrize("name", ["grpo", "lite_ppo", "reinforce_pp_baseline"])
def test_own_numbers(name, singleton, ddof):
    rewards, ids = sample(60)
    keywords = extras(name, 60) | {"eps": 0.01, "ddof": ddof, "singleton": singleton}
    actual = pykern.group_advantages(rewards, ids, estimator=name, **keywords)
    assert_accurate(actual, exact(name, rewards, ids, **keywords))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_sizes(name, rows):
    rewards, ids = sample(rows)
    keywords = extras(name, rows)
    actual = pykern.group_advantages(rewards, ids, estimator=name, **keywords)
    assert_accurate(actual, exact(name, rewards, ids, **keywords))


@pytest.mark.parametrize("preset", [None, "verl", "trl"])
@pytest.mark.parametrize("name", GROUPED)
def test_equal_rewards_are_exactly_zero(name, preset):
    for tenth in range(1, 10):
        for n in range(2, 65):
            rewards = torch.full((n + 3,), tenth / 10)
            rewards[-3:] = torch.tensor([0.0, 1.0, 3.0])
            ids = torch.tensor([7] * n + [-1] * 3)
            keywords = {"lengths": torch.arange(n + 3) + 1} if "lengths" in extras(name, 1) else {}
            actual = pykern.group_advantages(rewards, ids, estimator=name, preset=preset, **keywords)
            assert torch.count_nonzero(actual[:n]) == 0, (tenth, n, actual[:n])
            assert torch.count_nonzero(actual[n:]) > 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_eight_rewards_of_seven_tenths(dtype):
    rewards, ids = torch.full((8,), 0.7, dtype=dtype), torch.zeros(8, dtype=torch.int64)
    actual, metrics = pykern.group_advantages(rewards, ids, return_metrics=True)
    assert actual.tolist() == [0.0] * 8
    assert metrics["equal_groups"] == 1


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_whole_batch_equal(name):
    keywords = extras(name, 12)
    if name == "remax":
        keywords["baseline_rewards"] = torch.full((12,), 0.3)
    actual = pykern.group_advantages(torch.full((12,), 0.3), torch.arange(12) % 3, estimator=name, **keywords)
    assert actual.tolist() == [0.0] * 12


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_permutation_moves_advantages_along(name):
    rewards, ids = sample(120, torch.float64)
    keywords = extras(name, 120, torch.float64)
    order = torch.randperm(120)
    straight = pykern.group_advantages(rewards, ids, estimator=name, **keywords)
    moved = pykern.group_advantages(
        rewards[order], ids[order], estimator=name, **{key: value[order] for key, value in keywords.items()}
    )
    torch.testing.assert_close(moved, straight[order], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_non_finite_reward_leaves_only_its_row_out(name, bad):
    rewards, ids = sample(50)
    keywords = extras(name, 50)
    keep = torch.ones(50, dtype=torch.bool)
    keep[[3, 20]] = False
    rewards[~keep] = bad
    actual, metrics = pykern.group_advantages(rewards, ids, estimator=name, return_metrics=True, **keywords)
    rest = {key: value[keep] for key, value in keywords.items()}
    assert actual[~keep].tolist() == [0.0, 0.0]
    assert torch.equal(actual[keep], pykern.group_advantages(rewards[keep], ids[keep], estimator=name, **rest))
    assert metrics["non_finite"] == 2


@pytest.mark.usefixtures("everywhere")
def test_group_that_non_finite_rewards_leave_alone():
    rewards = torch.tensor([1.0, float("nan"), float("inf"), 2.0, 4.0, float("nan")])
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    actual, metrics = pykern.group_advantages(rewards, ids, estimator="dr_grpo", return_metrics=True)
    assert actual.tolist() == [0.0, 0.0, 0.0, -1.0, 1.0, 0.0]
    assert {key: int(value) for key, value in metrics.items()} == {
        "non_finite": 3, "groups": 3, "equal_groups": 0, "singletons": 1,
    }  # fmt: skip
    assert pykern.group_advantages(rewards, ids, estimator="dr_grpo", singleton="self")[0] == 1.0


@pytest.mark.usefixtures("everywhere")
def test_non_finite_baseline_reward_leaves_its_row_out():
    greedy = torch.tensor([0.5, float("nan")])
    actual, metrics = pykern.group_advantages(
        torch.ones(2),
        torch.zeros(2, dtype=torch.int64),
        estimator="remax",
        baseline_rewards=greedy,
        return_metrics=True,
    )
    assert actual.tolist() == [0.5, 0.0]
    assert metrics["non_finite"] == 1


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "name, preset, expected",
    [
        ("grpo", None, 0.0),
        ("grpo", "trl", 0.0),
        ("grpo", "verl", 3.0 / (1 + 1e-6)),
        ("dr_grpo", "verl", 3.0),
        ("rloo", None, 0.0),
        ("rloo", "verl", 3.0),
        ("opo", "verl", 3.0),
        ("opo", "trl", 0.0),
    ],
)
def test_singleton(name, preset, expected):
    rewards, ids = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0, 1, 1])
    keywords = {"lengths": torch.tensor([5, 5, 5])} if name == "opo" else {}
    actual = pykern.group_advantages(rewards, ids, estimator=name, preset=preset, **keywords)
    assert actual[0].item() == pytest.approx(expected, rel=1e-7, abs=0)


@pytest.mark.usefixtures("everywhere")
def test_closed_forms():
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([4, 4, 4, 4, 4])
    advantages = lambda name, **keywords: pykern.group_advantages(rewards, ids, estimator=name, **keywords)  # noqa: E731
    centred = rewards - 0.4
    torch.testing.assert_close(advantages("grpo", eps=0.0), centred / (0.3**0.5))
    torch.testing.assert_close(advantages("grpo", eps=0.0, ddof=0), centred / (0.24**0.5))
    torch.testing.assert_close(advantages("dr_grpo"), centred)
    torch.testing.assert_close(advantages("rloo"), centred * 5 / 4)
    torch.testing.assert_close(advantages("lite_ppo", eps=0.5), centred / (0.3**0.5 + 0.5))
    torch.testing.assert_close(advantages("opo", lengths=torch.tensor([3, 1, 1, 1, 2])), rewards - 0.5)


@pytest.mark.usefixtures("everywhere")
def test_large_offset_keeps_the_spread():
    rewards = 1e6 + torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    actual = pykern.group_advantages(rewards, torch.zeros(4, dtype=torch.int64), eps=0.0)
    torch.testing.assert_close(actual, (rewards - 1e6 - 0.375) / rewards.sub(1e6).std(), rtol=1e-9, atol=0)


@pytest.mark.usefixtures("everywhere")
def test_lengths_in_three_ways():
    rewards, ids = sample(20)
    lengths = torch.randint(0, 9, (20,))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    mask = torch.arange(9) < lengths[:, None]
    for name in ("opo", "reinforce_pp", "reinforce_pp_baseline"):
        straight = pykern.group_advantages(rewards, ids, estimator=name, lengths=lengths)
        assert torch.equal(straight, pykern.group_advantages(rewards, ids, estimator=name, cu_seqlens=cu_seqlens))
        assert torch.equal(straight, pykern.group_advantages(rewards, ids, estimator=name, mask=mask))
        assert torch.equal(straight, pykern.group_advantages(rewards, ids, estimator=name, mask=mask.float()))


@pytest.mark.usefixtures("everywhere")
def test_group_without_tokens():
    rewards, ids = torch.tensor([1.0, 2.0]), torch.tensor([0, 0])
    for name in ("opo", "reinforce_pp", "reinforce_pp_baseline"):
        assert pykern.group_advantages(rewards, ids, estimator=name, lengths=torch.tensor([0, 0])).tolist() == [
            0.0,
            0.0,
        ]


@pytest.mark.usefixtures("everywhere")
def test_whitened_tokens_have_mean_zero_and_variance_one():
    rewards, ids = sample(64, torch.float64)
    lengths = torch.randint(1, 50, (64,))
    for name in ("reinforce_pp", "reinforce_pp_baseline"):
        tokens = pykern.group_advantages(rewards, ids, estimator=name, lengths=lengths, eps=0.0, singleton="self")
        tokens = tokens.repeat_interleave(lengths)
        assert tokens.mean().abs() < 1e-12
        assert (tokens.var() - 1).abs() < 1e-9


@pytest.mark.usefixtures("everywhere")
def test_ids_that_collide_in_low_bits():
    ids = torch.arange(512) * (1 << 40)
    rewards = torch.randn(1024)
    actual = pykern.group_advantages(rewards, ids.repeat(2), estimator="dr_grpo")
    assert_accurate(actual, exact("dr_grpo", rewards, torch.arange(512).repeat(2)))


@pytest.mark.usefixtures("everywhere")
def test_id_types_strides_and_repeats_agree():
    rewards, ids = torch.randn(90), torch.randint(0, 9, (90,))
    straight = pykern.group_advantages(rewards, ids)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(straight, pykern.group_advantages(rewards, ids.to(dtype)))
    spread = torch.stack([rewards, torch.full_like(rewards, float("nan"))], dim=1)[:, 0]
    assert torch.equal(straight, pykern.group_advantages(spread, torch.stack([ids, ids + 1], dim=1)[:, 0]))
    with threads(1):
        assert torch.equal(straight, pykern.group_advantages(rewards, ids))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("groups", [1, 2, 1500])
@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "reinforce_pp_baseline", "lite_ppo"])
def test_few_large_groups_and_many_small_ones(name, groups):
    rewards, ids = torch.randn(3001), torch.randint(0, groups, (3001,)) - 7
    keywords = extras(name, 3001)
    actual, metrics = pykern.group_advantages(rewards, ids, estimator=name, return_metrics=True, **keywords)
    assert_accurate(actual, exact(name, rewards, ids, **keywords))
    sizes = torch.bincount(ids + 7)
    assert metrics["groups"] == torch.count_nonzero(sizes) and metrics["singletons"] == (sizes == 1).sum()
    assert torch.equal(actual, pykern.group_advantages(rewards, ids, estimator=name, **keywords))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_equal_rewards_among_others(name):
    sizes = torch.tensor([2, 3, 7, 8, 15, 33, 64] * 9)
    ids = torch.arange(len(sizes)).repeat_interleave(sizes)
    rewards = (torch.arange(len(sizes)) // 7 * 0.1 + 0.1).repeat_interleave(sizes)
    rewards, ids = torch.cat([rewards, torch.tensor([0.0, 1.0, 3.0])]), torch.cat([ids, torch.tensor([-1] * 3)])
    order = torch.randperm(len(ids))
    keywords = {"lengths": order + 1} if "lengths" in extras(name, 1) else {}
    actual = pykern.group_advantages(rewards[order], ids[order], estimator=name, **keywords)
    assert torch.count_nonzero(actual[ids[order] >= 0]) == 0
    assert torch.count_nonzero(actual) > 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "lite_ppo"])
def test_rewards_of_any_magnitude(name):
    ids = torch.arange(60) % 4
    rewards = torch.randn(60, dtype=torch.float64) * 10.0 ** (torch.arange(60) % 13 * 10 - 60).double()
    assert_accurate(
        pykern.group_advantages(rewards, ids, estimator=name, eps=0.0), exact(name, rewards, ids, eps=0.0), units=50.0
    )
    tiny = rewards * 1e-300
    assert_accurate(pykern.group_advantages(tiny, ids, estimator="dr_grpo"), exact("dr_grpo", tiny, ids), units=50.0)


def test_advantages_are_constants():
    rewards = torch.randn(6, requires_grad=True)
    assert not pykern.group_advantages(rewards, torch.zeros(6, dtype=torch.int64)).requires_grad


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["grpo", "opo", "remax"])
def test_opcheck(name):
    rewards, ids = sample(11)
    row = pykern.ESTIMATORS[name]
    given = extras(name, 11)
    numbers = (pykern.BASELINES.index(row.baseline), pykern.SCALES.index(row.scale), 1e-6, 1, False)
    arguments = (rewards, ids, given.get("lengths"), given.get("baseline_rewards"), *numbers)
    check_op(torch.ops.pykern.group_advantages.default, arguments)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["grpo", "reinforce_pp_baseline"])
def test_compiles_whole(name):
    rewards, ids = sample(40)
    keywords = extras(name, 40)
    call = lambda rewards: pykern.group_advantages(rewards, ids, estimator=name, return_metrics=True, **keywords)  # noqa: E731
    advantages, metrics = compile_whole(call)(rewards)
    assert torch.equal(advantages, call(rewards)[0])
    assert metrics["groups"] == call(rewards)[1]["groups"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rewards": [1.0]}, TypeError, "rewards: expected a floating-point tensor, got list"),
        ({"rewards": torch.ones(4, dtype=torch.int64)}, TypeError, "rewards: .* got torch.int64"),
        ({"rewards": torch.ones(2, 2)}, ValueError, r"rewards: .* got \[2, 2\]"),
        ({"group_ids": torch.zeros(4)}, TypeError, "group_ids: .* got torch.float32"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"group_ids: .* \[4\], got \[3\]"),
        ({"estimator": "grop"}, ValueError, "estimator: expected one of grpo, .* got 'grop'"),
        ({"preset": "slime"}, ValueError, "preset: expected one of None, verl, trl, got 'slime'"),
        ({"singleton": "one"}, ValueError, 'singleton: expected "zero" or "self"'),
        ({"ddof": 2}, ValueError, "ddof: expected 0 or 1, got 2"),
        ({"eps": -1.0}, ValueError, "eps: .* got -1.0"),
        ({"estimator": "opo"}, ValueError, "lengths: estimator 'opo' needs them"),
        ({"estimator": "remax"}, ValueError, "baseline_rewards: estimator 'remax' needs"),
        ({"baseline_rewards": torch.ones(4)}, ValueError, "baseline_rewards: estimator 'grpo' takes none"),
        ({"lengths": torch.ones(4)}, TypeError, "lengths: expected integers"),
        ({"cu_seqlens": torch.zeros(4, dtype=torch.int64)}, ValueError, r"cu_seqlens: expected \[5\]"),
        ({"mask": torch.ones(3, 7)}, ValueError, r"mask: .* \[4, T\], got \[3, 7\]"),
        (
            {"mask": torch.ones(4, 7), "lengths": torch.ones(4, dtype=torch.int64)},
            ValueError,
            "mask: expected one of lengths, mask and cu_seqlens, got also lengths",
        ),
    ],
)
def test_refuses(change, error, message):
    arguments = {"rewards": torch.ones(4), "group_ids": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        pykern.group_advantages(arguments.pop("rewards"), arguments.pop("group_ids"), **arguments)
