"""rollout_correction against its definition in float64, and opsm_mask."""

import math

import pytest
import torch

import pykern
from pykern.policy.rollout import CRITERIA, METRICS, ROLLOUT_CORRECTIONS
from pykern.reference import policy_rollout as reference
from tests.support import assert_accurate, check_op, compile_whole, threads


def batch(rows=7, columns=53, dtype=torch.float64, *, spread=0.5, poisoned=True):
    """Old and rollout log-probabilities and a mask under which they hold garbage; the second row is masked whole."""
    mask = torch.rand(rows, columns) < 0.7
    if rows > 1:
        mask[1] = False
    old = -3 * torch.rand(rows, columns, dtype=torch.float64)
    tensors = [old, old + spread * torch.randn(rows, columns)]
    if poisoned:
        garbage = torch.tensor([math.nan, math.inf, -math.inf]).double()[torch.randint(0, 3, mask.shape)]
        tensors = [torch.where(mask, tensor, garbage) for tensor in tensors]
    return *(tensor.to(dtype) for tensor in tensors), mask


def packed(old, rollout, mask):
    lengths = mask.sum(dim=1)
    return old[mask], rollout[mask], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def parts(name: str, **changes) -> dict:
    row = ROLLOUT_CORRECTIONS[name]
    names = (
        "weight",
        "weight_clip",
        "weight_rule",
        "reject",
        "reject_bounds",
        "veto",
        "normalize",
        "limit",
        "unscored",
    )
    return {part: getattr(row, part) for part in names} | changes


def compare(actual, exact, units: float) -> None:
    (weights, keep, metrics), (exact_weights, exact_keep, exact_metrics) = actual, exact
    assert torch.equal(keep, exact_keep)
    assert (weights is None) == (exact_weights is None)
    if weights is not None:
        assert_accurate(weights, exact_weights, units=units)
    assert set(metrics) == set(exact_metrics)
    for key, value in metrics.items():
        torch.testing.assert_close(
            value.double(), exact_metrics[key].double(), rtol=units * torch.finfo(value.dtype).eps, atol=1e-6, msg=key
        )


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype, layout", [(torch.float32, "padded"), (torch.float64, "packed")])
@pytest.mark.parametrize("name", ROLLOUT_CORRECTIONS)
def test_matches_definition(name, dtype, layout):
    # The geometric bounds hold for some sequences only where old and rollout are close.
    old, rollout, mask = batch(5, 37, dtype, spread=0.01 if "geo" in name or "nemo" in name else 0.5)
    keywords = {"mask": mask}
    if layout == "packed":
        old, rollout, cu_seqlens = packed(old, rollout, mask)
        keywords = {"cu_seqlens": cu_seqlens}
    actual = pykern.rollout_correction(old, rollout, correction=name, **keywords)
    exact = reference.rollout_correction(old.double(), rollout.double(), **parts(name), **keywords)
    assert actual[1].dtype == torch.bool and actual[2]["kl"].dtype == dtype
    compare(actual, exact, units=1e3)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("rule", ["truncate", "mask"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weight", [None, "token", "sequence", "geometric"])
def test_weights(weight, normalize, rule):
    old, rollout, mask = batch(spread=0.2)
    clip = (0.99, 1.01) if weight == "geometric" else (0.8, 1.3)
    keywords = {"weight": weight, "weight_clip": clip, "weight_rule": rule, "normalize": normalize, "limit": 1.5}
    actual = pykern.rollout_correction(old, rollout, mask=mask, **keywords)
    compare(actual, reference.rollout_correction(old, rollout, mask=mask, **keywords), units=1e3)
    if weight is not None and rule == "mask":
        assert (actual[0] == 0).any() and (actual[0] > 0).any()


BOUNDS = {
    "token_k1": (0.7, 1.5), "token_k2": (-math.inf, 0.1), "token_k3": (-math.inf, 0.1), "seq_sum_k1": (0.2, 3.0),
    "seq_sum_k2": (-math.inf, 4.5), "seq_sum_k3": (-math.inf, 4.5), "seq_mean_k1": (0.93, 1.07),
    "seq_mean_k2": (-math.inf, 0.12), "seq_mean_k3": (-math.inf, 0.12), "seq_max_k2": (-math.inf, 0.75),
    "seq_max_k3": (-math.inf, 0.75),
}  # fmt: skip


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("criterion", CRITERIA)
def test_criterion(criterion):
    old, rollout, mask = batch(rows=16)
    keywords = {"reject": (criterion,), "reject_bounds": (BOUNDS[criterion],), "weight": None}
    actual = pykern.rollout_correction(old, rollout, mask=mask, **keywords)
    compare(actual, reference.rollout_correction(old, rollout, mask=mask, **keywords), units=1e4)
    kept_rows = [bool(keep[of_row].any()) for keep, of_row in zip(actual[1], mask) if of_row.any()]
    assert actual[1].any() and not actual[1][mask].all()
    if criterion.startswith("seq"):
        assert any(kept_rows) and not all(kept_rows)


@pytest.mark.usefixtures("everywhere")
def test_chained_criteria_and_veto():
    old, rollout, mask = batch(rows=16)
    names = ("token_k1", "seq_sum_k2", "seq_max_k3")
    keywords = {"reject_bounds": [BOUNDS[name] for name in names], "veto": math.exp(-1.2), "limit": 1.0}
    actual = pykern.rollout_correction(old, rollout, mask=mask, reject=" token_k1, seq_sum_k2,seq_max_k3", **keywords)
    exact = reference.rollout_correction(old, rollout, mask=mask, reject=names, **keywords)
    compare(actual, exact, units=1e4)
    assert 0 < actual[2]["vetoed_fraction"] < 1


@pytest.mark.usefixtures("everywhere")
def test_bounds_as_numbers():
    old, rollout, mask = batch(spread=0.3)
    number = pykern.rollout_correction(old, rollout, mask=mask, reject="token_k1,token_k3", reject_bounds=1.25)
    pairs = pykern.rollout_correction(
        old, rollout, mask=mask, reject=["token_k1", "token_k3"], reject_bounds=[(0.8, 1.25), (-math.inf, 1.25)]
    )
    assert torch.equal(number[1], pairs[1]) and not number[1][mask].all()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("weight", ["token", "sequence"])
def test_limit_holds_where_exponentials_overflow(weight):
    old, rollout = torch.tensor([[0.0, 0.0], [-300.0, -1.0]]), torch.tensor([[-300.0, 0.0], [0.0, -1.0]])
    weights, _, metrics = pykern.rollout_correction(
        old, rollout, weight=weight, weight_clip=(0.0, math.inf), limit=20.0
    )
    expected = torch.tensor([[20.0, 0.0], [-20.0, 0.0]] if weight == "token" else [20.0, -20.0]).exp()
    torch.testing.assert_close(weights, expected)
    assert metrics["chi2_token"].isfinite() and metrics["chi2_seq"].isfinite()


@pytest.mark.usefixtures("everywhere")
def test_unscored_tokens():
    old, rollout = torch.full((1, 4), -1.0), torch.tensor([[-1.5, math.nan, -1.0, -1.5]])
    weights, keep, metrics = pykern.rollout_correction(
        old, rollout, weight_clip=(0.0, 5.0), reject="seq_mean_k1", reject_bounds=5.0
    )
    assert weights.isnan().tolist() == [[False, True, False, False]] and not keep.any()
    assert metrics["kl"].isnan() and metrics["rejected_seq_mean_k1"] == 1
    weights, keep, metrics = pykern.rollout_correction(
        old, rollout, weight_clip=(0.0, 5.0), reject="seq_mean_k1", reject_bounds=5.0, unscored="one"
    )
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.0, 0.0, 0.5]]).exp())
    assert keep.all() and metrics["kl"] == -0.25
    for criterion in CRITERIA:
        assert not pykern.rollout_correction(old, rollout, reject=criterion, reject_bounds=5.0)[1][0, 1]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("weight", [None, "token", "sequence"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 3)])
def test_nothing_unmasked(shape, weight):
    old = torch.full(shape, math.nan)
    weights, keep, metrics = pykern.rollout_correction(
        old, old, mask=torch.zeros(shape), weight=weight, normalize=True, reject="seq_max_k3", reject_bounds=0.1
    )
    assert not keep.any() and keep.shape == shape
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["rejected_fraction"] == 0 and metrics["normalization"] == 1
    if weight == "token":
        assert torch.count_nonzero(weights) == 0
    if weight == "sequence":
        assert weights.tolist() == [1.0] * shape[0]


@pytest.mark.usefixtures("everywhere")
def test_long_and_many_sequences():
    old, rollout, mask = batch(2, 1501, spread=0.02)
    actual = pykern.rollout_correction(old, rollout, mask=mask, correction="slime_mis")
    compare(actual, reference.rollout_correction(old, rollout, mask=mask, **parts("slime_mis")), units=1e5)
    old, rollout, mask = batch(41, 3)
    actual = pykern.rollout_correction(old, rollout, mask=mask, correction="verl_seq_is_rs")
    compare(actual, reference.rollout_correction(old, rollout, mask=mask, **parts("verl_seq_is_rs")), units=1e5)


@pytest.mark.usefixtures("everywhere")
def test_types_strides_repeats_and_threads_agree():
    old, rollout, mask = batch(10, 70, torch.float32)
    call = lambda *tensors: pykern.rollout_correction(*tensors[:2], mask=tensors[2], correction="slime_mis")  # noqa: E731
    straight = call(old, rollout, mask)
    turned = call(old.t().contiguous().t(), rollout.t().contiguous().t(), mask.t().contiguous().t().to(torch.int32))
    with threads(1):
        single = call(old, rollout, mask)
    for other in (turned, single, call(old, rollout, mask)):
        assert torch.equal(straight[0], other[0]) and torch.equal(straight[1], other[1])
        assert all(torch.equal(straight[2][key], other[2][key]) for key in straight[2])
    half = call(old.half(), rollout.half(), mask)
    assert torch.equal(half[0], call(old.half().float(), rollout.half().float(), mask)[0])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_opsm(layout):
    logprobs, rollout, mask = batch(rows=12, spread=0.3)
    logprobs, advantages = logprobs.requires_grad_(), torch.tensor([-1.0, 1.0, -2.0, 0.0]).repeat(3)
    rollout[0, mask[0].nonzero()[0]] = math.nan
    means = (rollout - logprobs).detach().masked_fill(~mask, 0.0).nan_to_num(0.0).sum(1) / mask.sum(1).clamp(min=1)
    dropped = (advantages < 0) & (means > 0.0)
    assert 0 < dropped.sum() < (advantages < 0).sum()
    expected = mask & ~dropped[:, None]
    if layout == "padded":
        actual = pykern.opsm_mask(logprobs, rollout, advantages, delta=0.0, mask=mask)
        per_token = pykern.opsm_mask(logprobs, rollout, advantages[:, None].expand_as(mask), delta=0.0, mask=mask)
    else:
        logprobs, rollout, cu_seqlens = packed(logprobs, rollout, mask)
        actual = pykern.opsm_mask(logprobs, rollout, advantages, delta=0.0, cu_seqlens=cu_seqlens)
        spread = advantages.repeat_interleave(cu_seqlens.diff())
        per_token = pykern.opsm_mask(logprobs, rollout, spread, delta=0.0, cu_seqlens=cu_seqlens)
        expected = expected[mask]
    assert torch.equal(actual, expected) and torch.equal(per_token, expected)


def test_results_are_constants():
    old = torch.zeros(2, 3, requires_grad=True)
    weights, keep, metrics = pykern.rollout_correction(old, old)
    assert not weights.requires_grad and not metrics["kl"].requires_grad


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("weight", [0, 1, 2, 3])
def test_opcheck(weight):
    old, rollout, mask = batch(poisoned=False)
    settings = [0.5, 2.0, 20.0, 1e-4] + [0.1, 5.0] * len(CRITERIA)
    op = torch.ops.pykern.rollout_correction.default
    check_op(op, (old, rollout, mask, None, weight, True, 2047, False, True, settings))
    old, rollout, cu_seqlens = packed(old, rollout, mask)
    check_op(op, (old, rollout, None, cu_seqlens, weight, False, 0, True, False, settings))


@pytest.mark.usefixtures("everywhere")
def test_compiles_whole():
    old, rollout, mask = batch()

    def call(old, rollout):
        weights, keep, metrics = pykern.rollout_correction(old, rollout, mask=mask, correction="verl_seq_is_rs")
        return weights, keep, metrics["kl"], pykern.opsm_mask(old, rollout, old[:, 0], delta=0.1, mask=mask)

    for compiled, direct in zip(compile_whole(call)(old, rollout), call(old, rollout)):
        assert torch.equal(compiled, direct)


def test_the_table_holds_what_the_function_takes():
    assert len(METRICS) == 24
    for name, row in ROLLOUT_CORRECTIONS.items():
        assert row.source, name
        assert len(row.reject) == len(row.reject_bounds), name


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"old_logprobs": [1.0]}, TypeError, "old_logprobs: .* got list"),
        ({"old_logprobs": torch.zeros(6)}, ValueError, r"old_logprobs: expected \[B, T\], got \[6\]; packed"),
        ({"rollout_logprobs": torch.zeros(2, 4)}, ValueError, r"rollout_logprobs: .* \[2, 3\], got \[2, 4\]"),
        ({"mask": torch.zeros(3)}, ValueError, r"mask: .* got \[3\]"),
        ({"cu_seqlens": torch.zeros(3)}, TypeError, "cu_seqlens: .* got torch.float32"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int64)}, ValueError, "cu_seqlens: .* take a mask instead"),
        ({"correction": "tiz"}, ValueError, "correction: expected one of tis, .* got 'tiz'"),
        ({"weight": "word"}, ValueError, "weight: .* got 'word'"),
        ({"weight_clip": 2.0}, ValueError, r"weight_clip: expected 2 numbers, \(low, high\), got 2.0"),
        ({"weight_clip": (3.0, 2.0)}, ValueError, r"weight_clip: .* got \(3.0, 2.0\)"),
        ({"weight_rule": "clip"}, ValueError, 'weight_rule: expected "truncate" or "mask"'),
        ({"reject": "seq_max_k1", "reject_bounds": 2.0}, ValueError, "reject: .* got 'seq_max_k1'"),
        ({"reject": "token_k1,token_k1", "reject_bounds": 2.0}, ValueError, "reject: expected each criterion once"),
        ({"reject": "token_k1"}, ValueError, "reject_bounds: reject='token_k1' needs them"),
        ({"reject": "token_k1", "reject_bounds": [1.0, 2.0]}, ValueError, "reject_bounds: .* 1 criteria, got 2"),
        ({"reject": "token_k1", "reject_bounds": -1.0}, ValueError, "reject_bounds: .* token_k1, got -1.0"),
        ({"reject": "token_k2", "reject_bounds": [(2.0, 1.0)]}, ValueError, "reject_bounds: expected low <= high"),
        ({"veto": 0.0}, ValueError, "veto: .* got 0.0"),
        ({"limit": -1.0}, ValueError, "limit: .* got -1.0"),
        ({"unscored": "zero"}, ValueError, "unscored: .* got 'zero'"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"old_logprobs": torch.zeros(2, 3), "rollout_logprobs": torch.zeros(2, 3)} | change
    with pytest.raises(error, match=message):
        pykern.rollout_correction(arguments.pop("old_logprobs"), arguments.pop("rollout_logprobs"), **arguments)


def test_refuses_wrong_bounds_of_sequences():
    for bounds in ([0, 2], [1, 6], [0, 4, 3, 6]):
        with pytest.raises(RuntimeError, match="cu_seqlens: expected"):
            pykern.rollout_correction(torch.zeros(6), torch.zeros(6), cu_seqlens=torch.tensor(bounds))
