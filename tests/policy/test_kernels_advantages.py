"""Every part of an advantage beside every other, on the CPU and by the CUDA kernels, against the definition."""

import itertools
import math
import random

import pytest
import torch

from pykern.policy.estimators import BASELINES, FILTERS, FINISHES, METRICS, SCALES, TRANSFORMS
from pykern.reference import policy_advantages as reference
from tests.support import DEVICES, assert_accurate, emulator, on

ORDERS = ["random:3", "random:4"]
"""Beside those in which every launch on the emulator runs."""

KERNEL_DEVICES = [name for name in DEVICES if name != "cpu"]
DETAILS = {
    "eps": 1e-4,
    "finish_eps": 1e-3,
    "k": 3,
    "relative_length": 0.5,
    "fallback": math.inf,
    "window": (-0.5, 0.6),
    "ddof": 1,
    "singleton": "zero",
}
"""What each call below says beside the parts, if nothing else is said."""


def inputs(rows: int, groups: int, components: int = 1, kind: str = "normal", dtype=torch.float64) -> dict:
    """Ragged groups in no order, a tenth of the rewards missing, some responses empty."""
    rewards = torch.randn(rows, components, dtype=torch.float64)
    if kind == "binary":
        rewards = (rewards > 0.3).double()
    elif kind == "coarse":
        rewards = (2 * rewards).round() / 10
    rewards[torch.rand(rows, components) < 0.1] = float("nan")
    given = torch.randn(rows, dtype=torch.float64)
    given[torch.rand(rows) < 0.05] = float("inf")
    return {
        "rewards": rewards.to(dtype),
        "group_ids": torch.randint(0, groups, (rows,)) * 1_000_003 - 77,
        "lengths": torch.randint(0, 40, (rows,)),
        "baseline_rewards": given.to(dtype),
    }


def parts(transform="none", baseline="group_mean", scale="none", finish="none", filter="none", decompose=False):
    return {
        "transform": transform,
        "baseline": baseline,
        "scale": scale,
        "finish": finish,
        "filter": filter,
        "decompose": decompose,
    }


def run(data: dict, chosen: dict, weights=None, overlong=None, **details):
    """The op's results."""
    told = DETAILS | details
    longest, buffer, factor = overlong or (0.0, 0.0, 0.0)
    return torch.ops.pykern.group_advantages.default(
        data["rewards"],
        weights or [1.0] * data["rewards"].shape[1],
        data["group_ids"],
        data["lengths"],
        data["baseline_rewards"] if chosen["baseline"] == "given" else None,
        chosen["decompose"],
        TRANSFORMS.index(chosen["transform"]),
        BASELINES.index(chosen["baseline"]),
        SCALES.index(chosen["scale"]),
        FINISHES.index(chosen["finish"]),
        FILTERS.index(chosen["filter"]),
        told["ddof"],
        told["singleton"] == "self",
        [told["eps"], told["finish_eps"], told["k"], longest, buffer, factor, told["relative_length"],
         told["fallback"], *told["window"]],
    )  # fmt: skip


def defined(data: dict, chosen: dict, weights=None, **details):
    """The definition's, in float64."""
    doubles = {name: value.double() for name, value in data.items() if value.is_floating_point()}
    if chosen["baseline"] != "given":
        doubles["baseline_rewards"] = None
    return reference.group_advantages(**(data | doubles), **chosen, component_weights=weights, **(DETAILS | details))


def agree(data: dict, chosen: dict, weights=None, **details) -> torch.Tensor:
    """Runs the op beside the definition; the advantages."""
    advantages, keep, counts = run(data, chosen, weights, **details)
    exact, exact_keep, exact_counts = defined(data, chosen, weights, **details)
    told = f"{chosen} {details}"
    assert torch.equal(keep, exact_keep), told
    assert dict(zip(METRICS, counts.tolist())) == exact_counts, told
    try:
        # A difference of nearly equal numbers, as a mean that is subtracted leaves, has the error of the larger ones.
        assert_accurate(advantages, exact, units=1.0 if advantages.dtype == torch.float32 else 1e5)
    except AssertionError as error:
        raise AssertionError(told) from error
    return advantages


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("components", [1, 3])
def test_every_baseline_with_every_scale(scale, components):
    data = inputs(83, 9, components)
    for baseline, finish in itertools.product(BASELINES, FINISHES):
        agree(data, parts(baseline=baseline, scale=scale, finish=finish, decompose=components > 1))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["binary", "coarse"])
def test_every_transform_with_every_baseline_and_scale(transform, kind):
    data = inputs(61, 7, 2, kind)
    for baseline, scale in itertools.product(BASELINES, SCALES):
        agree(data, parts(transform, baseline, scale), weights=[0.75, 0.5], singleton="self", ddof=0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", ["normal", "coarse"])
def test_filters_act_before_the_batch_is_measured(filter, kind):
    data = inputs(90, 25, 2, kind)
    whole = [
        ("min_max", "group_mean", "beta"),
        ("none", "batch_mean", "batch_std"),
        ("none", "groups_mean", "groups_std"),
        ("none", "group_mean", "nonzero_share"),
        ("none", "group_mean", "group_std"),
    ]
    for (transform, baseline, scale), finish, decompose in itertools.product(whole, FINISHES, (False, True)):
        agree(data, parts(transform, baseline, scale, finish, filter, decompose))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("fallback", [0.5, 1.0])
@pytest.mark.parametrize("baseline", BASELINES)
def test_fallback_of_token_deviations(baseline, fallback):
    data = inputs(80, 11)
    own = run(data, parts(baseline=baseline, scale="token_std"))[0]
    assert not torch.equal(agree(data, parts(baseline=baseline, scale="token_std"), fallback=fallback), own)
    agree(data, parts("relative_length", baseline, "token_std", "batch_std"), fallback=fallback)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("seed", range(40))
def test_parts_at_random(seed):
    choose = random.Random(seed)
    components = choose.choice([1, 1, 2, 16])
    # On both sides of what a block's table holds in shared memory.
    data = inputs(
        choose.choice([0, 1, 2, 3, 17, 700]),
        choose.choice([1, 2, 40]),
        components,
        choose.choice(["normal", "binary", "coarse"]),
        choose.choice([torch.float32, torch.float64]),
    )
    chosen = parts(*map(choose.choice, (TRANSFORMS, BASELINES, SCALES, FINISHES, FILTERS)), choose.random() < 0.4)
    agree(
        data,
        chosen,
        [choose.choice([0.5, 1.0, -0.25]) for _ in range(components)],
        overlong=choose.choice([None, (32.0, 16.0, 0.75)]),
        k=choose.choice([1, 2, 5]),
        ddof=choose.choice([0, 1]),
        singleton=choose.choice(["zero", "self"]),
        fallback=choose.choice([math.inf, 1.0]),
    )


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("spread", [1e-3, 1.0])
@pytest.mark.parametrize("outlier", [0.95, 1e3, 1e8])
def test_deviation_of_the_others_beside_an_outlier(outlier, spread):
    values = torch.tensor([0.35, 0.36, 0.34, 0.355, 0.35, 0.35, 0.35], dtype=torch.float64) * spread
    chosen = parts(baseline="leave_one_out", scale="leave_one_out_std")
    for sign in (1, -1):
        rewards = torch.cat([values, torch.tensor([outlier * sign])])
        data = inputs(8, 1) | {"rewards": rewards[:, None].double(), "group_ids": torch.zeros(8, dtype=torch.int64)}
        actual, exact = run(data, chosen, eps=0.0)[0], defined(data, chosen, eps=0.0)[0]
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("common, odd", [(0.35, 0.95), (0.95, 0.35), (0.7, 0.1), (0.1, 1000.3)])
@pytest.mark.parametrize("size", [3, 7, 8, 33])
def test_others_that_are_equal_have_no_deviation(common, odd, size):
    rewards = torch.full((size, 1), common, dtype=torch.float64)
    rewards[size // 2] = odd
    data = inputs(size, 1) | {"rewards": rewards, "group_ids": torch.zeros(size, dtype=torch.int64)}
    actual = run(data, parts(baseline="leave_one_out", scale="leave_one_out_std"), eps=0.0)[0]
    # NeMo's formula gives thousands here; the odd one is divided by 1.
    assert actual[size // 2].item() == pytest.approx(odd - common, rel=1e-12)
    assert actual[: size // 2].abs().max() <= math.sqrt(size)


@pytest.mark.parametrize("device_name", KERNEL_DEVICES)
@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("transform", ["none", "best_gap", "pass_at_k_leave_one_out", "relative_length"])
@pytest.mark.parametrize("scale", ["none", "group_std", "leave_one_out_std", "token_std", "group_mean"])
def test_groups_in_a_larger_table_and_in_other_places(scale, transform, decompose, device_name):
    """A group's advantages are the same bits whoever else is in the batch, and wherever its rows lie."""
    with on(device_name) as place, place:
        data = inputs(60, 5, 2, "coarse")
        chosen = parts(transform, "leave_one_out", scale, decompose=decompose)
        alone = run(data, chosen)[0]
        order = torch.randperm(60)
        moved = run({name: value[order] for name, value in data.items()}, chosen)[0]
        assert torch.equal(moved, alone[order])
        # More rows of a block than its table in shared memory holds.
        many = inputs(1100, 2, 2) | {"group_ids": torch.arange(1100) % 2 + 1}
        among = run({name: torch.cat([many[name], data[name]]) for name in data}, chosen)[0]
        assert torch.equal(among[1100:], alone)


@pytest.mark.usefixtures("everywhere")
def test_components_of_equal_weight_may_change_places():
    rewards = torch.tensor([[0.7, 0.3, 0.1], [0.3, 0.7, 0.1], [0.3, 0.7, 0.1], [0.7, 0.3, 0.1]], dtype=torch.float64)
    data = inputs(4, 1) | {"rewards": rewards, "group_ids": torch.zeros(4, dtype=torch.int64)}
    advantages, keep, _ = run(data, parts(scale="group_std", filter="equal"), weights=[0.1] * 3)
    assert advantages.tolist() == [0.0] * 4 and not keep.any()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("k", [1, 3, 40, 199, 200, 500])
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name.startswith("pass_at_k")])
def test_samples_drawn_from_a_large_group(transform, k):
    data = inputs(200, 1, 1, "binary")
    agree(data, parts(transform, "group_mean", "group_std"), k=k)


@pytest.mark.parametrize("name", [name for name in DEVICES if name == "emulated"])
@pytest.mark.parametrize("rows, groups", [(1, 1), (75, 3), (75, 60), (600, 1), (700, 300)])
def test_any_order_of_threads_gives_the_same_bits(rows, groups, name):
    """The emulator fails where the results of two orders differ, or where two threads race."""
    before = emulator().orders()
    emulator().set_orders(ORDERS)
    try:
        with on(name):
            data = inputs(rows, groups, 2)
            for transform, baseline, scale in zip(itertools.cycle(TRANSFORMS), itertools.cycle(BASELINES), SCALES):
                run(data, parts(transform, baseline, scale, "batch_std", "difficulty", True), fallback=1.0)
            one = data | {"rewards": data["rewards"][:, :1].contiguous()}
            for baseline in ("group_mean", "leave_one_out", "given"):
                run(one, parts(baseline=baseline, scale="group_std", filter="difficulty"))
            answers = torch.randint(0, 5, (rows,))
            torch.ops.pykern.group_entropy.default(data["group_ids"], answers)
    finally:
        emulator().set_orders(before)


# --- group_entropy --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("answers", [1, 2, 700])
@pytest.mark.parametrize("rows, groups", [(0, 1), (1, 1), (2, 1), (61, 7), (700, 1), (700, 3), (1300, 400)])
def test_entropy_of_answers(rows, groups, answers):
    group_ids = torch.randint(0, groups, (rows,)) * 12_345_678_901 - 5
    answer_ids = torch.randint(0, answers, (rows,)) * (1 << 40) - 9
    entropy, sizes = torch.ops.pykern.group_entropy.default(group_ids, answer_ids)
    exact, exact_sizes = reference.group_entropy(group_ids, answer_ids)
    assert torch.equal(sizes, exact_sizes)
    torch.testing.assert_close(entropy, exact, rtol=1e-13, atol=1e-14)
    assert torch.equal(entropy == 0, exact == 0)


@pytest.mark.usefixtures("everywhere")
def test_answers_are_told_apart_by_group_and_whole_id():
    group_ids = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0])
    answer_ids = torch.tensor([5, 5 + (1 << 32), 5, 5, 5, 5, -5, torch.iinfo(torch.int64).max])
    entropy, sizes = torch.ops.pykern.group_entropy.default(group_ids, answer_ids)
    assert entropy.tolist() == [2, 2, 0, 0, 0, 0, 2, 2] and sizes.tolist() == [4] * 8
