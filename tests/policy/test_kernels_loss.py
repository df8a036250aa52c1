"""policy_loss's op: each of its parts, alone and beside others, against the definition in float64."""

import pytest
import torch

from tests.policy.loss_parts import assert_parts_match, choose, parts_of, per_sequence, run

GATE = {"rule": "gate", "shape": (1.0, 1.05, 0.0, 0.0)}
TAPER = {"rule": "taper", "shape": (2.0, 3.0, 3.0, 2.0)}
RULES = {
    "clip": {},
    "two-sided": {"ratio_limit": 1.1, "dual_clip": 1.3},
    "limit within the bounds": {"ratio_limit": 1.05, "clip_high": 0.5},
    "weight": {"rule": "weight"},
    "weight of negatives": {"rule": "weight", "weight_negative_only": True},
    "log": {"rule": "log"},
    "gate": GATE,
    "taper": TAPER,
}
RATIOS = ["token", "sequence", "product", "clipped_sequence"]
LENGTHS = [40, 0, 3, 21]

pytestmark = pytest.mark.usefixtures("everywhere")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_rule_of_ratio(ratio, rule, padded):
    tensors = parts_of(LENGTHS, padded=padded)
    assert_parts_match(choose(tensors, "", ratio=ratio, negative_scale=0.7, **RULES[rule]))
    by_sequence = per_sequence(tensors, "advantages")
    assert_parts_match(choose(by_sequence, "", ratio=ratio, aggregate="seq-mean-token-mean", **RULES[rule]))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kl_gradient", ["value", "straight_through", "importance"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "abs"])
def test_divergence_and_its_gradient(kl, kl_gradient, ratio):
    named = choose(parts_of(LENGTHS), "", kl=kl, kl_gradient=kl_gradient, ratio=ratio, aggregate="seq-mean-token-mean")
    assert_parts_match(named)
    assert_parts_match(named | {"kl_log_ratio_limit": 0.3, "kl_limit": 0.04, "log_ratio_limit": 0.25})


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("rule", ["clip", "gate", "taper"])
def test_limits_of_ratios_stop_gradients(rule, ratio):
    tensors = parts_of([9, 30, 12, 5])
    named = choose(tensors, "", ratio=ratio, log_ratio_limit=0.2, **RULES[rule])
    assert_parts_match(named)
    assert_parts_match(named | {"sequence_log_ratio_low": -0.02, "sequence_log_ratio_high": 0.05})


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("anchor", ["k1", "k2", "k3", "abs"])
def test_anchor(anchor, ratio):
    tensors = parts_of(LENGTHS)
    assert_parts_match(choose(tensors, "", anchor=anchor, ratio=ratio))
    assert_parts_match(choose(tensors, "anchor_keep", anchor=anchor, ratio=ratio, kl="k3", kl_limit=0.01))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("stabilisation", ["total_variation", "binary_kl"])
def test_stabilisation_and_keep(stabilisation, ratio):
    tensors = parts_of([300, 0, 41], spread=0.5)
    kind = {"total_variation": (0.03, 0.02), "binary_kl": (0.02, 0.01)}[stabilisation]
    named = {"stabilisation": stabilisation, "stabilisation_low": kind[0], "stabilisation_high": kind[1]}
    assert_parts_match(choose(tensors, "", ratio=ratio, **named))
    assert_parts_match(choose(tensors, "keep", ratio=ratio, kl="k2", kl_gradient="importance", **named))
    assert_parts_match(choose(tensors, "keep", ratio=ratio))


@pytest.mark.parametrize("ratio", [ratio for ratio in RATIOS if ratio != "clipped_sequence"])
@pytest.mark.parametrize("rule", RULES)
def test_second_advantages(rule, ratio):
    tensors = parts_of(LENGTHS)
    names = "second_advantages advantage_weights"
    assert_parts_match(choose(tensors, names, ratio=ratio, negative_scale=0.5, **RULES[rule]))
    for some in (("second_advantages",), ("advantage_weights",), ("advantages", *names.split())):
        assert_parts_match(choose(per_sequence(tensors, *some), names, ratio=ratio, **RULES[rule]))


@pytest.mark.parametrize("rule", ["clip", "weight"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("names", ["clip_low", "clip_high", "clip_low clip_high"])
def test_bounds_per_token(names, ratio, rule):
    assert_parts_match(choose(parts_of([200, 0, 31]), names, ratio=ratio, rule=rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_rollout(ratio, rule):
    tensors = parts_of(LENGTHS)
    for rollout in ({}, {"rollout_low": 0.9, "rollout_high": 1.1}):
        for kind in ("truncate", "mask"):
            named = choose(tensors, "rollout_logprobs", ratio=ratio, rollout_rule=kind, **rollout, **RULES[rule])
            assert_parts_match(named)
            assert_parts_match(named | {"rollout_weights": tensors["rollout_weights"], "log_ratio_limit": 0.2})
    by_sequence = per_sequence(tensors, "rollout_weights")
    assert_parts_match(choose(by_sequence, "rollout_weights", ratio=ratio, **RULES[rule]))


@pytest.mark.parametrize("aggregate", ["token-mean", "token-sum", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_entropy_and_empty_sequences(ratio, aggregate):
    tensors = parts_of(LENGTHS)
    named = choose(tensors, "entropy", ratio=ratio, aggregate=aggregate, entropy_coef=0.1, horizon=50.0)
    assert_parts_match(named)
    assert_parts_match(named | {"count_empty": True})
    assert_parts_match(named | {"denominator": 7, "kl": "k3", "kl_coef": 0.1, "ref_logprobs": tensors["ref_logprobs"]})


@pytest.mark.parametrize("rule", ["clip", "gate", "taper"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_token_weights(ratio, rule):
    tensors = parts_of(LENGTHS)
    named = choose(tensors, "token_weights entropy", ratio=ratio, entropy_coef=0.1, kl="k3", anchor="k2", **RULES[rule])
    assert_parts_match(named)
    assert_parts_match(named | {"kl_gradient": "importance"})


EVERYTHING = "keep anchor_keep rollout_logprobs rollout_weights entropy clip_low clip_high token_weights"
PARTS = {
    "stabilisation": "total_variation",
    "stabilisation_low": 0.2,
    "stabilisation_high": 0.3,
    "kl": "k3",
    "kl_gradient": "importance",
    "anchor": "abs",
    "entropy_coef": 0.1,
    "rollout_rule": "mask",
}


def everything(tensors: dict, ratio: str, rule: str) -> dict:
    second = "" if ratio == "clipped_sequence" else " second_advantages advantage_weights"
    return choose(tensors, EVERYTHING + second, ratio=ratio, **PARTS, **RULES[rule])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_everything_at_once(ratio, rule, dtype):
    """Also over parts of long sequences, borders of tiles, and padding."""
    for padded, lengths in ((False, [1030, 0, 511, 3, 33]), (True, [67, 0, 5])):
        assert_parts_match(everything(parts_of(lengths, dtype, padded=padded), ratio, rule))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 31, 127, 128, 129, 511, 512, 513])
@pytest.mark.parametrize("ratio", RATIOS)
def test_sizes_of_one_sequence(ratio, length, padded):
    assert_parts_match(everything(parts_of([length], torch.float32, padded=padded, unmasked=1.0), ratio, "clip"))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
def test_no_sequences_and_nothing_unmasked(ratio, padded):
    for tensors in (parts_of([], padded=padded), parts_of([0, 0], padded=padded), parts_of([7, 0, 40], unmasked=0.0)):
        results = run(everything(tensors, ratio, "gate"))
        assert all(torch.count_nonzero(result) == 0 for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", RATIOS)
def test_unaligned_tensors_and_repeats_give_the_same_bits(ratio, dtype):
    """The same values one element behind an aligned address."""
    named = everything(parts_of([700, 12, 0, 1100], dtype), ratio, "gate")
    moved = dict(named)
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            moved[name] = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].copy_(value)
    straight = run(named)
    for again in (run(named), run(moved)):
        assert all(torch.equal(one, other) for one, other in zip(straight, again))


@pytest.mark.parametrize("ratio", RATIOS)
def test_without_gradient_the_same_loss_and_no_coefficients(ratio):
    named = everything(parts_of([70, 12, 0]), ratio, "gate")
    loss, coefficient, entropy_coefficient, metrics = run(named, with_gradient=False)
    expected = run(named)
    assert coefficient.shape == entropy_coefficient.shape == (0,)
    assert torch.equal(loss, expected[0]) and torch.equal(metrics, expected[-1])


@pytest.mark.parametrize("offsets", [[0, 60, 999], [-7, 20, 100], [50, 20, 0]])
@pytest.mark.parametrize("ratio", RATIOS)
def test_wrong_offsets_touch_no_other_memory(ratio, offsets):
    """Only the CPU's code can look at the offsets without waiting; a kernel keeps to its tensors all the same.

    Where sequences overlap, nobody promises whose gradient a token has.
    """
    named = everything(parts_of([100]), ratio, "clip") | {"cu_seqlens": torch.tensor(offsets)}
    try:
        run(named)
    except RuntimeError as error:
        assert "cu_seqlens: expected" in str(error)
