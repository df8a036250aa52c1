"""The parts of an advantage in any combination, against the definition and against what they are by count."""

import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pykern
from pykern.policy.estimators import METRICS
from pykern.reference import policy_advantages as reference
from tests.policy.advantages_cases import by_row, defined, exact, extras, roundings, row_of, sample
from tests.support import assert_accurate, check_op, threads

NAN = math.nan


def combinations() -> list[tuple[str, str, str, str]]:
    every = itertools.product(pykern.TRANSFORMS, pykern.BASELINES, pykern.SCALES, pykern.FINISHES)
    # Whether a reward is exactly zero is decided by rounding after these.
    rounded = ("relative_length", "pass_at_k_leave_one_out")
    return [parts for parts in every if not (parts[0] in rounded and parts[2] == "nonzero_share")]


def check_combination(parts, index: int) -> None:
    """One combination with components, missing rewards, a filter, a penalty and numbers that vary with `index`."""
    transform, baseline, scale, finish = parts
    rows, components = 60, 1 if index % 3 else 3
    rewards = torch.randint(0, 4, (rows, components)).double() / 3
    if index % 5 == 0:
        rewards = torch.rand(rows, components, dtype=torch.float64)
    rewards[torch.rand(rows, components) < 0.1] = NAN
    ids = torch.randint(0, 12, (rows,)) * 1_000_003 - 5
    ids[-1] = 99
    keywords = {
        "transform": transform,
        "baseline": baseline,
        "scale": scale,
        "finish": finish,
        "decompose": components == 3 and index % 2 == 0,
        "component_weights": [1.0] * components if index % 2 else [0.5, 2.0, 1.5][:components],
        "filter": pykern.FILTERS[index % 3],
        "window": (0.3, 0.7),
        "eps": 1e-3,
        "finish_eps": 1e-3,
        "ddof": index % 2,
        "singleton": ("zero", "self")[index // 2 % 2],
        "lengths": torch.randint(0, 9, (rows,)),
        "k": 1 + index % 4,
        "relative_length": 0.5,
        "fallback": 2.0 if index % 7 else math.inf,
        "overlong": (7.3, 3.1, 0.55) if index % 4 == 0 else None,
    }
    if baseline == "given":
        keywords["baseline_rewards"] = torch.rand(rows, dtype=torch.float64)
    want, want_keep, want_metrics = reference.group_advantages(rewards, ids, **keywords)
    got, keep, metrics = pykern.group_advantages(rewards, ids, return_keep=True, return_metrics=True, **keywords)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda m: f"{parts} {index}: {m}")
    assert torch.equal(keep, want_keep)
    assert {name: int(value) for name, value in metrics.items()} == want_metrics


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("chunk", range(8))
def test_combinations(chunk):
    for index, parts in enumerate(random.Random(0).sample(combinations(), 240)[chunk::8]):
        check_combination(parts, 8 * index + chunk)


def test_every_combination():
    """On the CPU alone, where a call takes microseconds."""
    for index, parts in enumerate(combinations()):
        check_combination(parts, index)


@pytest.mark.usefixtures("everywhere")
def test_parts_take_the_place_of_the_estimators_own():
    rewards, ids = sample(50)
    lengths = torch.randint(1, 30, (50,))
    same = [
        ({"estimator": "grpo", "scale": "none"}, {"estimator": "dr_grpo"}),
        ({"estimator": "dr_grpo", "baseline": "leave_one_out"}, {"estimator": "rloo"}),
        ({"estimator": "dr_grpo", "scale": "batch_std"}, {"estimator": "lite_ppo"}),
        ({"estimator": "grpo", "transform": "min_max", "scale": "beta"}, {"estimator": "bnpo"}),
        ({"estimator": "reinforce_pp", "baseline": "group_mean", "lengths": lengths}, {"estimator": "dler"}),
    ]
    for parts, whole in same:
        got = pykern.group_advantages(rewards, ids, **parts)
        whole = whole | ({"lengths": lengths} if "lengths" in parts else {})
        assert torch.equal(got, pykern.group_advantages(rewards, ids, **whole))
        assert torch.count_nonzero(got) > 0


# --- components -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("components", [1, 2, 16])
@pytest.mark.parametrize("name", ["grpo", "gdpo", "bnpo", "bnpo_decomposed", "opo"])
def test_components(name, components, dtype):
    rewards = torch.rand(70, components).to(dtype)
    rewards[torch.rand(70, components) < 0.15] = NAN
    rewards[3], rewards[4, 0] = NAN, -math.inf
    ids = torch.randint(0, 8, (70,))
    weights = torch.linspace(0.5, 2.0, components).tolist()
    for keywords in ({}, {"component_weights": weights}):
        keywords = keywords | extras(name, 70)
        actual, metrics = pykern.group_advantages(rewards, ids, estimator=name, return_metrics=True, **keywords)
        want, _, want_metrics = defined(name, rewards, ids, **keywords)
        assert_accurate(actual, want, units=roundings(dtype))
        assert {key: int(value) for key, value in metrics.items()} == want_metrics
        assert actual[3] == 0


@pytest.mark.usefixtures("everywhere")
def test_missing_component_leaves_the_others():
    rewards = torch.tensor([[1.0, NAN], [0.0, 2.0], [1.0, 0.0], [NAN, NAN]], dtype=torch.float64)
    ids = torch.zeros(4, dtype=torch.int64)
    summed, keep, metrics = pykern.group_advantages(
        rewards, ids, estimator="dr_grpo", return_keep=True, return_metrics=True
    )
    torch.testing.assert_close(summed, torch.tensor([-1 / 3, 2 / 3, -1 / 3, 0.0], dtype=torch.float64))
    assert keep.tolist() == [True, True, True, False]
    assert metrics["missing"] == 1 and metrics["non_finite"] == 1
    apart = pykern.group_advantages(rewards, ids, estimator="dr_grpo", decompose=True)
    want = torch.tensor([1 / 3, -2 / 3 + 1.0, 1 / 3 - 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(apart, want)


@pytest.mark.usefixtures("everywhere")
def test_component_of_a_constant_adds_nothing():
    """0.7 for all 8 of a group: its own advantage would be rounding over eps."""
    rewards = torch.stack([torch.randn(16), torch.full((16,), 0.7)], dim=1)
    ids = torch.arange(16) // 8
    both = pykern.group_advantages(rewards, ids, decompose=True, scale="group_std")
    assert torch.equal(both, pykern.group_advantages(rewards[:, 0], ids))


# --- filters and penalties --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", list(pykern.ESTIMATORS))
@pytest.mark.parametrize("filter", ["equal", "difficulty"])
def test_filtered_groups_are_as_if_absent(name, filter):
    rewards, ids = torch.randint(0, 2, (90,)).float(), torch.randint(0, 18, (90,))
    rewards[ids == 3], rewards[ids == 5] = 1.0, 0.0
    rewards[7] = NAN
    keywords, window = extras(name, 90), (0.25, 0.75)
    actual, keep, metrics = pykern.group_advantages(
        rewards, ids, estimator=name, filter=filter, window=window, return_keep=True, return_metrics=True, **keywords
    )
    shares = {int(group): rewards[(ids == group) & rewards.isfinite()].double() for group in ids.unique()}
    if filter == "equal":
        kept = {group for group, values in shares.items() if len(values) == 1 or values.max() != values.min()}
    else:
        kept = {group for group, values in shares.items() if 0.25 < values.mean() < 0.75}
    want = torch.tensor([int(group) in kept for group in ids]) & rewards.isfinite()
    assert 0 < want.sum() < 80
    assert torch.equal(keep, want)
    assert metrics["filtered"] == 89 - want.sum()
    assert torch.count_nonzero(actual[~keep]) == 0
    alone = pykern.group_advantages(rewards[keep], ids[keep], estimator=name, **by_row(keywords, keep))
    assert torch.equal(actual[keep], alone)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gdpo", "opo", "lite_ppo"])
def test_overlong_penalty_is_part_of_the_reward(name):
    rewards, ids = torch.rand(64), torch.randint(0, 9, (64,))
    lengths = torch.randint(1, 30, (64,))
    penalty = (-(lengths.double() - (24 - 8)) / 8 * 0.5).clamp(max=0)
    assert 0 < (penalty < 0).sum() < 64
    actual = pykern.group_advantages(rewards, ids, estimator=name, lengths=lengths, overlong=(24, 8, 0.5))
    keywords = {"lengths": lengths}
    assert_accurate(actual, exact(name, rewards.double() + penalty, ids, **keywords))


@pytest.mark.usefixtures("everywhere")
def test_relative_length_gives_equal_rewards_a_signal():
    rewards, ids = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    actual = pykern.group_advantages(
        rewards, ids, estimator="dr_grpo", transform="relative_length", relative_length=0.5,
        lengths=torch.tensor([10, 20, 30, 40]),
    )  # fmt: skip
    torch.testing.assert_close(actual, 0.5 * (0.625 - torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)))


# --- pass@k by counting subsets ---------------------------------------------------------------------------------------


def best_of_subsets(correct: list[bool], k: int, member: int) -> dict[str, float]:
    """What a sample adds to pass@k, over all subsets of k that hold it."""
    n, others = len(correct), [i for i in range(len(correct)) if i != member]
    subsets = [*itertools.combinations(others, k - 1)]
    total = math.comb(n, k)
    with_member = sum(correct[member] or any(correct[i] for i in subset) for subset in subsets)
    rest = sum(any(correct[i] for i in subset) for subset in subsets)
    # Mean over the others of what their own marginal would be without the member.
    without = [*itertools.combinations(others, k)]
    pass_at_k = sum(any(correct[i] for i in subset) for subset in without) / max(len(without), 1)
    return {
        "pkpo_marginal": with_member / total,
        "pkpo": (with_member - rest) / total,
        "pkpo_leave_one_out": with_member / total - k / (n - 1) * pass_at_k,
    }


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["pkpo", "pkpo_leave_one_out", "pkpo_marginal", "pass_at_k"])
def test_pass_at_k_counts_subsets(name, k):
    n = 7
    for c in range(1, n):
        correct = [i < c for i in range(n)]
        rewards = torch.tensor(correct, dtype=torch.float64) * 0.5
        actual = pykern.group_advantages(rewards, torch.zeros(n, dtype=torch.int64), estimator=name, k=k)
        counted = [best_of_subsets(correct, k, member) for member in range(n)]
        if name == "pass_at_k":
            alone = torch.tensor([one["pkpo"] for one in counted]).double() * n / k
            want = (n * alone - alone.sum()) / (n - 1)
        else:
            want = torch.tensor([one[name] for one in counted]).double()
            if want.max() - want.min() < 1e-6:
                want = torch.zeros(n).double()
        torch.testing.assert_close(actual, want, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("everywhere")
def test_best_gap_goes_to_the_best_alone():
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.5, 0.5, 0.2], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    actual = pykern.group_advantages(rewards, ids, estimator="grpo_passk", eps=0.0)
    assert actual[[0, 2, 3, 4, 5]].tolist() == [0.0] * 5  # a tie for the best has no gap
    torch.testing.assert_close(actual[1], 0.5 / rewards[:3].std())


# --- single estimators ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("everywhere")
def test_leave_one_out_deviation_of_nearly_equal_others():
    """The difference of two sums of squares has no digits left here."""
    rewards = torch.tensor([0.35, 0.35 + 1e-9, 0.35 - 2e-9, 0.95], dtype=torch.float64)
    ids = torch.zeros(4, dtype=torch.int64)
    actual = pykern.group_advantages(rewards, ids, estimator="grpo_leave_one_out", eps=0.0)
    want = (0.95 - rewards[:3].mean()) / rewards[:3].std()
    torch.testing.assert_close(actual[3], want, rtol=1e-5, atol=0)
    equal = torch.tensor([0.35] * 7 + [0.95])
    actual = pykern.group_advantages(equal, torch.zeros(8, dtype=torch.int64), estimator="grpo_leave_one_out")
    torch.testing.assert_close(actual[7], torch.tensor(0.6))


@pytest.mark.usefixtures("everywhere")
def test_both_meanings_of_gpg():
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    centred = torch.tensor([0.0, 0.0, 0.5, -0.5, 0.0, 0.0])
    assert torch.equal(pykern.group_advantages(rewards, ids, estimator="gpg"), centred * 3)
    assert torch.equal(pykern.group_advantages(rewards, ids, estimator="gpg_nonzero"), centred * 2)
    assert torch.equal(pykern.group_advantages(rewards, ids, estimator="gpg", preset="verl"), centred * 2)


@pytest.mark.usefixtures("everywhere")
def test_bnpo_divides_by_the_density_of_a_beta_distribution():
    ids = torch.arange(6).repeat_interleave(8)
    rewards = (torch.rand(48, dtype=torch.float64) < torch.linspace(0.1, 0.9, 6)[ids]).double()
    shares = rewards.view(6, 8).mean(dim=1)
    mean, q = shares.mean(), shares.mean() * (1 - shares.mean()) / shares.var() - 1
    alpha, beta = (1 + q * mean / 3).clamp(min=1), (1 + q * (1 - mean) / 3).clamp(min=1)
    inner = shares.clamp(1e-12, 1 - 1e-12)  # the class takes no borders; groups there have no signal
    density = torch.distributions.Beta(alpha, beta).log_prob(inner).exp()
    want = (rewards - shares[ids]) / density[ids]
    assert alpha > 1 and beta > 1
    torch.testing.assert_close(pykern.group_advantages(rewards, ids, estimator="bnpo"), want)
    # Rewards of any range come between 0 and 1 first.
    torch.testing.assert_close(pykern.group_advantages(3 * rewards - 7, ids, estimator="bnpo"), want)
    # Means that are all the same suggest no distribution.
    same = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    actual = pykern.group_advantages(same, torch.tensor([1, 1, 2, 2]), estimator="bnpo")
    assert actual.tolist() == [-0.5, 0.5, 0.5, -0.5]


@pytest.mark.usefixtures("everywhere")
def test_maxrl_of_a_mean_that_is_not_above_zero():
    rewards = torch.tensor([-1.0, 1.0, -3.0, 1.0, 0.0, 1.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    actual = pykern.group_advantages(rewards, ids, estimator="maxrl", eps=0.0)
    assert actual.tolist() == [0.0, 0.0, 0.0, 0.0, -1.0, 1.0]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["opo", "hapo"])
def test_response_without_tokens_is_not_in_a_mean_over_tokens(name):
    rewards = torch.tensor([0.7, 0.7, 0.7, 0.0, 1.0, 0.0, 0.3])
    ids, lengths = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([3, 7, 11, 0, 2, 1, 0])
    actual = pykern.group_advantages(rewards, ids, estimator=name, lengths=lengths)
    assert actual[:4].tolist() == [0.0] * 4
    fewer = pykern.group_advantages(rewards[4:6], ids[4:6], estimator=name, lengths=lengths[4:6])
    assert torch.equal(actual[4:6], fewer) and torch.count_nonzero(fewer) == 2


@pytest.mark.usefixtures("everywhere")
def test_hapo_falls_back_to_grpo():
    rewards = torch.tensor([1.0] + [0.0] * 7, dtype=torch.float64)
    ids, lengths = torch.zeros(8, dtype=torch.int64), torch.tensor([1] + [100] * 7)
    tokens = rewards.repeat_interleave(lengths)
    over_tokens = (rewards - tokens.mean()) / (tokens.std(correction=0) + 1e-6)
    assert over_tokens.max() > 5
    actual = pykern.group_advantages(rewards, ids, estimator="hapo", lengths=lengths)
    torch.testing.assert_close(actual, pykern.group_advantages(rewards, ids))
    actual = pykern.group_advantages(rewards, ids, estimator="hapo", lengths=lengths, fallback=math.inf)
    torch.testing.assert_close(actual, over_tokens)


@pytest.mark.usefixtures("everywhere")
def test_copo_weighs_groups_by_the_agreement_of_their_answers():
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    ids, answers = torch.tensor([5, 5, 5, 5, 6, 6, 7]), torch.tensor([1, 1, 2, 3, 4, 5, 9])
    entropy = pykern.group_entropy(ids, answers)
    torch.testing.assert_close(entropy, torch.tensor([1.5] * 4 + [1.0] * 2 + [0.0], dtype=torch.float64))
    assert entropy[6] == 0
    means = torch.tensor([0.5 * (1 - 1.5 * 0.75 / 2), 1 - 1.0 * 0.5 / 1, 1.0], dtype=torch.float64)
    want = ((means - means.mean()) / (means.std() + 1e-6))[[0, 0, 0, 0, 1, 1, 2]]
    actual = pykern.group_advantages(rewards, ids, estimator="copo_global", answer_ids=answers)
    torch.testing.assert_close(actual, want)
    single = pykern.group_advantages(rewards.float(), ids, estimator="copo_global", answer_ids=answers)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(AssertionError):
        plain = pykern.group_advantages(rewards, ids, estimator="copo_global")
        torch.testing.assert_close(plain, want)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("rows", [0, 1, 2, 37, 700])
def test_entropy(rows):
    ids, answers = torch.randint(-9, 9, (rows,)) * 1_000_000_007, torch.randint(-2, 2, (rows,)) * (1 << 40)
    got, sizes = torch.ops.pykern.group_entropy.default(ids, answers)
    want, want_sizes = reference.group_entropy(ids, answers)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(sizes, want_sizes)
    if rows == 37:
        check_op(torch.ops.pykern.group_entropy.default, (ids, answers))
        assert torch.equal(got, pykern.group_entropy(ids.to(torch.int64), answers))


@pytest.mark.parametrize(
    "ids, answers, error, message",
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), TypeError, "group_ids: .* got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3), TypeError, "answer_ids: .* got torch.float32"),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int8), ValueError, r"answer_ids: .* \[3\], got"),
        ([1, 2], torch.zeros(2, dtype=torch.int64), TypeError, "group_ids: .* got list"),
    ],
)
def test_entropy_refuses(ids, answers, error, message):
    with pytest.raises(error, match=message):
        pykern.group_entropy(ids, answers)


@pytest.mark.usefixtures("everywhere")
def test_presets_that_mean_other_parts():
    rewards, ids = sample(60)
    for name, preset, same in (("grpo", "nemo", "grpo_leave_one_out"), ("grpo", "prime_rl", "dr_grpo")):
        assert row_of(name, preset) != row_of(name)
        peers = pykern.group_advantages(rewards, ids, estimator=name, preset=preset)
        assert torch.equal(peers, pykern.group_advantages(rewards, ids, estimator=same))
        assert not torch.equal(peers, pykern.group_advantages(rewards, ids, estimator=name))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", list(pykern.ESTIMATORS))
def test_threads_and_repeats_agree_bit_for_bit(name):
    rewards, ids = sample(400, name=name)
    keywords = extras(name, 400)
    many = pykern.group_advantages(rewards, ids, estimator=name, **keywords)
    with threads(1):
        assert torch.equal(many, pykern.group_advantages(rewards, ids, estimator=name, **keywords))
    assert torch.equal(many, pykern.group_advantages(rewards, ids, estimator=name, **keywords))


@pytest.mark.usefixtures("everywhere")
def test_components_of_any_strides():
    rewards, ids = torch.rand(40, 3), torch.randint(0, 5, (40,))
    straight = pykern.group_advantages(rewards, ids, estimator="gdpo")
    transposed = rewards.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert torch.equal(straight, pykern.group_advantages(transposed, ids, estimator="gdpo"))
    wide = torch.full((40, 6), NAN)
    wide[:, ::2] = rewards
    assert torch.equal(straight, pykern.group_advantages(wide[:, ::2], ids, estimator="gdpo"))


def test_callers_in_several_threads_do_not_share_memory():
    cases = [(*sample(rows, name=name), name, extras(name, rows)) for rows, name in ((700, "hapo"), (90, "bnpo"))] * 4

    def call(case) -> torch.Tensor:
        rewards, ids, name, keywords = case
        return pykern.group_advantages(rewards, ids, estimator=name, **keywords)

    alone = [call(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for got, want in zip(pool.map(call, cases), alone):
                assert torch.equal(got, want)


def test_batches_beyond_the_kept_memory():
    """Rows above 2^18, whose memory is given back, and few again."""
    rewards, ids = torch.rand(300_000), torch.randint(0, 40_000, (300_000,))
    few = pykern.group_advantages(rewards[:99], ids[:99] % 9)
    many = pykern.group_advantages(rewards, ids)
    chosen = ids < 50
    assert torch.equal(many[chosen], pykern.group_advantages(rewards[chosen], ids[chosen]))
    assert torch.equal(few, pykern.group_advantages(rewards[:99], ids[:99] % 9))


def test_metrics_are_named():
    rewards, ids = sample(10)
    assert tuple(pykern.group_advantages(rewards, ids, return_metrics=True)[1]) == METRICS
