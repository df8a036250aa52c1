"""group_advantages against its definition in float64 and against closed forms."""

import pytest
import torch

import pykern
from pykern.policy.estimators import PRESETS
from tests.policy.advantages_cases import ESTIMATORS, GROUPED, by_row, exact, extras, numbers, roundings, row_of, sample
from tests.support import assert_accurate, check_op, compile_whole, threads


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_matches_definition(name, preset, dtype):
    if preset is not None and row_of(name) == row_of(name, preset) and name not in ("grpo", "lite_ppo", "dler"):
        preset = "trl"  # numbers alone differ: those of one peer will do
    rewards, ids = sample(97, dtype, name)
    keywords = extras(name, 97, dtype, preset)
    actual = pykern.group_advantages(rewards, ids, estimator=name, preset=preset, **keywords)
    assert actual.dtype == dtype
    assert_accurate(actual, exact(name, rewards, ids, preset, **keywords), units=roundings(dtype))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grpo", "opo", "remax", "gdpo"])
def test_half_precision_rewards_give_float32(name, dtype):
    rewards, ids = sample(50, dtype)
    keywords = extras(name, 50, dtype)
    actual = pykern.group_advantages(rewards, ids, estimator=name, **keywords)
    assert actual.dtype == torch.float32
    assert_accurate(actual, exact(name, rewards, ids, **keywords))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("singleton", ["zero", "self"])
@pytest.mark.parametrize("name", ["grpo", "lite_ppo", "reinforce_pp_baseline", "gdpo", "copo_global", "gpg"])
def test_own_numbers(name, singleton, ddof):
    rewards, ids = sample(60)
    keywords = extras(name, 60) | {"eps": 0.01, "finish_eps": 0.02, "ddof": ddof, "singleton": singleton}
    actual = pykern.group_advantages(rewards, ids, estimator=name, **keywords)
    assert_accurate(actual, exact(name, rewards, ids, **keywords))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_sizes(name, rows):
    rewards, ids = sample(rows, name=name)
    keywords = extras(name, rows)
    actual = pykern.group_advantages(rewards, ids, estimator=name, **keywords)
    assert_accurate(actual, exact(name, rewards, ids, **keywords))


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("name", GROUPED)
def test_equal_rewards_are_exactly_zero(name, preset):
    """Groups of 2 to 64 whose rewards are all 0.1, ... 0.9, alone in their batch but for one group that is not."""
    sizes = torch.arange(2, 65)
    equal = torch.arange(len(sizes)).repeat_interleave(sizes)
    ids = torch.cat([equal, torch.tensor([-1] * 3)])
    keywords = extras(name, len(ids), preset=preset)
    for tenth in range(1, 10):
        rewards = torch.full((len(ids),), tenth / 10)
        rewards[-3:] = torch.tensor([0.0, 0.0, 3.0])
        actual = pykern.group_advantages(rewards, ids, estimator=name, preset=preset, **keywords)
        assert torch.count_nonzero(actual[:-3]) == 0, (tenth, ids[actual.nonzero()])
        assert torch.count_nonzero(actual[-3:]) > 0


@pytest.mark.parametrize("name", ["grpo", "grpo_leave_one_out", "opo", "hapo", "bnpo", "gdpo", "copo_global"])
def test_one_group_of_equal_rewards_is_exactly_zero(name):
    for tenth in range(1, 10):
        for n in range(2, 65):
            rewards, ids = torch.full((n,), tenth / 10), torch.full((n,), 7)
            keywords = extras(name, n)
            actual = pykern.group_advantages(rewards, ids, estimator=name, **keywords)
            assert torch.count_nonzero(actual) == 0, (tenth, n, actual)


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
    rewards, ids = sample(120, torch.float64, name)
    keywords = extras(name, 120, torch.float64)
    order = torch.randperm(120)
    straight = pykern.group_advantages(rewards, ids, estimator=name, **keywords)
    moved = pykern.group_advantages(rewards[order], ids[order], estimator=name, **by_row(keywords, order))
    torch.testing.assert_close(moved, straight[order], rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_non_finite_reward_leaves_only_its_row_out(name, bad):
    rewards, ids = sample(50, name=name)
    keywords = extras(name, 50)
    keep = torch.ones(50, dtype=torch.bool)
    keep[[3, 20]] = False
    rewards[~keep] = bad
    actual, metrics = pykern.group_advantages(rewards, ids, estimator=name, return_metrics=True, **keywords)
    rest = by_row(keywords, keep)
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
        "non_finite": 3, "missing": 0, "groups": 3, "equal_groups": 0, "singletons": 1, "filtered": 0,
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
        tokens = pykern.group_advantages(
            rewards, ids, estimator=name, lengths=lengths, finish_eps=0.0, singleton="self"
        )
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
    rewards, ids = torch.cat([rewards, torch.tensor([0.0, 0.0, 3.0])]), torch.cat([ids, torch.tensor([-1] * 3)])
    order = torch.randperm(len(ids))
    keywords = extras(name, len(order))
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
@pytest.mark.parametrize("name", ["grpo", "opo", "remax", "gdpo"])
def test_opcheck(name):
    rewards, ids = sample(11)
    given, parts = extras(name, 11), numbers(name)
    tables = {
        "transform": pykern.TRANSFORMS,
        "baseline": pykern.BASELINES,
        "scale": pykern.SCALES,
        "finish": pykern.FINISHES,
    }
    chosen = [table.index(parts[part]) for part, table in tables.items()]
    settings = [1e-6, 1e-8, 1.0, 0.0, 0.0, 0.0, 0.0, float("inf"), 0.0, 1.0]
    arguments = (
        rewards.view(-1, 1), [1.0], ids, given.get("lengths"), given.get("baseline_rewards"), parts["decompose"],
        *chosen, 0, 1, False, settings,
    )  # fmt: skip
    check_op(torch.ops.pykern.group_advantages.default, arguments)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["grpo", "reinforce_pp_baseline", "gdpo", "copo_global"])
def test_compiles_whole(name):
    rewards, ids = sample(40)
    rewards = torch.stack([rewards, rewards.square()], dim=1)
    keywords = extras(name, 40) | {"overlong": (20, 5, 1.0), "lengths": torch.randint(1, 30, (40,))}
    keywords["answer_ids"] = ids % 3 if name == "copo_global" else None

    def call(rewards):
        return pykern.group_advantages(
            rewards, ids, estimator=name, filter="equal", return_keep=True, return_metrics=True, **keywords
        )

    for got, want in zip(compile_whole(call)(rewards), call(rewards)):
        assert got == want if isinstance(got, dict) else torch.equal(got, want)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rewards": [1.0]}, TypeError, "rewards: expected a floating-point tensor, got list"),
        ({"rewards": torch.ones(4, dtype=torch.int64)}, TypeError, "rewards: .* got torch.int64"),
        ({"rewards": torch.ones(4, 17)}, ValueError, r"rewards: .* up to 16 components, .* got \[4, 17\]"),
        ({"rewards": torch.ones(4, 1, 1)}, ValueError, r"rewards: .* got \[4, 1, 1\]"),
        ({"component_weights": [1.0, 2.0]}, ValueError, r"component_weights: expected 1 finite numbers, got \[1.0, 2"),
        ({"group_ids": torch.zeros(4)}, TypeError, "group_ids: .* got torch.float32"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"group_ids: .* \[4\], got \[3\]"),
        ({"estimator": "grop"}, ValueError, "estimator: expected one of grpo, .* got 'grop'"),
        ({"preset": "slim"}, ValueError, "preset: expected one of None, verl, trl, .* got 'slim'"),
        ({"transform": "max"}, ValueError, "transform: expected one of none, min_max, .* got 'max'"),
        ({"baseline": "mean"}, ValueError, "baseline: expected one of none, group_mean, .* got 'mean'"),
        ({"scale": "std"}, ValueError, "scale: expected one of none, group_std, .* got 'std'"),
        ({"finish": "whiten"}, ValueError, "finish: expected one of none, batch_std, token_whiten, got 'whiten'"),
        ({"filter": "hard"}, ValueError, "filter: expected one of none, equal, difficulty, got 'hard'"),
        ({"k": 0}, ValueError, "k: expected an integer of at least 1, got 0"),
        ({"k": 1.5}, ValueError, "k: expected an integer of at least 1, got 1.5"),
        ({"finish_eps": -1.0}, ValueError, "finish_eps: .* got -1.0"),
        ({"fallback": -1.0}, ValueError, "fallback: .* got -1.0"),
        ({"overlong": (10, 0, 1.0)}, ValueError, r"overlong: .* a buffer above 0, got \(10, 0, 1.0\)"),
        ({"overlong": (10, 4, 1.0)}, ValueError, "lengths: overlong needs them"),
        ({"max_rows": 4}, ValueError, "max_rows: expected None without process_group"),
        ({"answer_ids": torch.ones(4)}, TypeError, "answer_ids: .* got torch.float32"),
        ({"answer_ids": torch.ones(3, dtype=torch.int64)}, ValueError, r"answer_ids: .* \[4\], got \[3\]"),
        ({"singleton": "one"}, ValueError, 'singleton: expected "zero" or "self"'),
        ({"component_weights": 2.0, "rewards": torch.ones(4, 2)}, ValueError, "component_weights: .* got 2.0"),
        ({"process_group": "world"}, TypeError, "process_group: expected a torch.distributed.ProcessGroup or None"),
        ({"ddof": 2}, ValueError, "ddof: expected 0 or 1, got 2"),
        ({"eps": -1.0}, ValueError, "eps: .* got -1.0"),
        ({"estimator": "opo"}, ValueError, "lengths: estimator 'opo' needs them"),
        ({"estimator": "remax"}, ValueError, "baseline_rewards: estimator 'remax' needs"),
        ({"baseline_rewards": torch.ones(4)}, ValueError, "baseline_rewards: estimator 'grpo' takes none"),
        ({"lengths": torch.ones(4)}, TypeError, "lengths: expected a tensor of integers, got torch.float32"),
        ({"lengths": [1, 2, 3, 4]}, TypeError, "lengths: expected a tensor of integers, got list"),
        ({"mask": [[1], [1], [1], [1]]}, TypeError, "mask: expected a tensor, got list"),
        ({"window": 0.5}, ValueError, r"window: expected 2 numbers, \(low, high\), got 0.5"),
        ({"overlong": (10, 4)}, ValueError, r"overlong: expected 3 numbers, .* got \(10, 4\)"),
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
