"""optimal_token_baseline against its definition in float64, and against closed forms."""

import math

import pytest
import torch

import pykern
from pykern.reference import policy_token_baseline as reference
from tests.support import assert_accurate, check_op, compile_whole, threads

NAN = float("nan")
TOKENS = ("returns", "logprobs", "sum_p2", "importance_weights")


def batch(rows: int, columns: int, dtype=torch.float32, mask: str = "tail") -> dict:
    """Ragged groups in no order, with huge and negative ids; the last response is alone. Masked places hold garbage."""
    kept = torch.arange(columns) < torch.randint(columns // 3, columns + 1, (rows, 1))
    if mask == "holes":
        kept = torch.rand(rows, columns) < 0.7
    if rows > 4:
        kept[3] = False
    ids = torch.randint(0, max(rows // 5, 1), (rows,)) * 1_000_000_007 - 5_000_000_000
    if rows:
        ids[-1] = torch.iinfo(torch.int64).min
    logprobs = torch.randn(rows, columns, 20).mul(2).log_softmax(-1)
    tensors = {
        "returns": torch.randn(rows, columns),
        "logprobs": logprobs[..., 0],
        "sum_p2": logprobs.exp().square().sum(-1),
        "importance_weights": torch.rand(rows, columns) * 2,
    }
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)[torch.randint(0, 3, kept.shape)]
    tensors = {name: torch.where(kept, tensor.to(dtype), garbage) for name, tensor in tensors.items()}
    return tensors | {"mask": kept, "group_ids": ids}


def call(function, tensors: dict, weighted: bool = True, **keywords):
    tensors = dict(tensors)
    positional = [tensors.pop(name) for name in ("returns", "logprobs", "sum_p2", "group_ids")]
    if not weighted:
        del tensors["importance_weights"]
    return function(*positional, **tensors, **keywords)


def in_dtype(tensors: dict, dtype) -> dict:
    return {name: tensor.to(dtype) if name in TOKENS else tensor for name, tensor in tensors.items()}


def assert_matches(tensors: dict, weighted: bool = True, **keywords):
    actual = call(pykern.optimal_token_baseline, tensors, weighted, **keywords)
    wide = tensors["returns"].dtype == torch.float64
    assert actual.dtype == (torch.float64 if wide else torch.float32)
    exact = call(reference.optimal_token_baseline, in_dtype(tensors, torch.float64), weighted, **keywords)
    torch_own = call(reference.optimal_token_baseline, in_dtype(tensors, torch.float32), weighted, **keywords)
    assert_accurate(actual, exact, None if wide else torch_own, units=100.0 if wide else 1.0)
    if "mask" in tensors:
        assert torch.count_nonzero(actual[~tensors["mask"]]) == 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero_tail", [True, False])
@pytest.mark.parametrize("align", pykern.ALIGNMENTS)
@pytest.mark.parametrize("mask", ["tail", "holes"])
def test_matches_definition(mask, align, zero_tail, dtype):
    tensors = batch(23, 70, dtype, mask)
    for weighted in (True, False):
        assert_matches(tensors, weighted, align=align, zero_tail=zero_tail)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("singleton", ["zero", "self"])
@pytest.mark.parametrize("align", pykern.ALIGNMENTS)
@pytest.mark.parametrize("rows, columns", [(0, 0), (0, 4), (3, 0), (1, 1), (2, 1), (7, 4), (40, 3), (6, 1100)])
def test_sizes(rows, columns, align, singleton):
    assert_matches(batch(rows, columns), align=align, singleton=singleton, eps=0.1)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("align", pykern.ALIGNMENTS)
def test_without_a_mask(align):
    tensors = batch(12, 1030)
    del tensors["mask"]
    tensors = {name: tensor.nan_to_num(-0.5, 1.0, -2.0) for name, tensor in tensors.items()}
    assert_matches(tensors, align=align)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("align", pykern.ALIGNMENTS)
def test_one_group_and_many(align):
    tensors = batch(60, 40)
    assert_matches(tensors | {"group_ids": torch.zeros(60, dtype=torch.int64)}, align=align)
    assert_matches(tensors | {"group_ids": torch.arange(60) % 29}, align=align)
    assert_matches(tensors | {"group_ids": torch.arange(60)}, align=align, singleton="self")


@pytest.mark.usefixtures("everywhere")
def test_closed_form():
    """Two responses of equal weight per step: the baseline is the mean of their returns."""
    returns = torch.tensor([[4.0, 1.0, 5.0], [2.0, 3.0, 9.0]], dtype=torch.float64)
    logprobs, sum_p2 = torch.full((2, 3), 0.25).double().log(), torch.full((2, 3), 0.5).double()
    mask, ids = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([5, 5])
    actual = pykern.optimal_token_baseline(returns, logprobs, sum_p2, ids, mask=mask, eps=0.0)
    assert actual.tolist() == [[1.0, -1.0, 5.0], [-1.0, 1.0, 0.0]]
    actual = pykern.optimal_token_baseline(returns, logprobs, sum_p2, ids, mask=mask, eps=0.0, zero_tail=False)
    assert actual.tolist() == [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]
    late = torch.tensor([[1, 1, 1], [0, 1, 1]])
    actual = pykern.optimal_token_baseline(returns, logprobs, sum_p2, ids, mask=late, align="token", eps=0.0)
    assert actual.tolist() == [[0.5, -4.0, 5.0], [0.0, -0.5, 4.0]]
    # Weights 1 and 2 on the first steps: energies 1 and 4.
    weights = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    actual = pykern.optimal_token_baseline(
        returns, logprobs, sum_p2, ids, mask=mask, importance_weights=weights, eps=0.0
    )
    assert actual[:, 0].tolist() == pytest.approx([4 - 12 / 5, 2 - 12 / 5])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("align", pykern.ALIGNMENTS)
def test_equal_returns_are_exactly_zero(align):
    tensors = batch(40, 30, mask="holes")
    for tenth in range(1, 10):
        tensors["returns"] = torch.where(tensors["mask"], tenth / 10, NAN)
        actual = call(pykern.optimal_token_baseline, tensors, align=align, zero_tail=False)
        assert torch.count_nonzero(actual) == 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("name", TOKENS)
def test_non_finite_value_leaves_only_its_response_out(name, bad):
    tensors = batch(30, 20)
    tensors["mask"][[2, 7]] = True
    for key in TOKENS:
        tensors[key][[2, 7]] = -torch.rand(2, 20)
    tensors[name][2, 11], tensors[name][7, 19] = bad, bad
    if name == "logprobs" and bad == -math.inf:
        # The probability of such a token is 0, and no sum suffers.
        actual, metrics = call(pykern.optimal_token_baseline, tensors, return_metrics=True)
        assert actual.isfinite().all() and metrics["non_finite"] == 0
        return
    actual, metrics = call(pykern.optimal_token_baseline, tensors, return_metrics=True)
    keep = torch.ones(30, dtype=torch.bool)
    keep[[2, 7]] = False
    rest = call(pykern.optimal_token_baseline, {key: tensor[keep] for key, tensor in tensors.items()})
    assert metrics["non_finite"] == 2
    assert torch.count_nonzero(actual[~keep]) == 0
    assert torch.equal(actual[keep], rest)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("align", pykern.ALIGNMENTS)
def test_strides_types_and_repeats_agree(align):
    tensors = batch(20, 36)
    straight = call(pykern.optimal_token_baseline, tensors, align=align)
    turned = {key: tensor.t().contiguous().t() for key, tensor in tensors.items()}
    assert torch.equal(call(pykern.optimal_token_baseline, turned, align=align), straight)
    moved = dict(tensors)
    for key in TOKENS:
        space = torch.empty(tensors[key].numel() + 1)[1:].view(tensors[key].shape)
        moved[key] = space.copy_(tensors[key])
    moved["mask"] = tensors["mask"].double() * 0.5
    assert torch.equal(call(pykern.optimal_token_baseline, moved, align=align), straight)
    with threads(1):
        assert torch.equal(call(pykern.optimal_token_baseline, tensors, align=align), straight)
    small = tensors | {"group_ids": torch.arange(20, dtype=torch.int8) % 3}
    wide = tensors | {"group_ids": torch.arange(20) % 3}
    assert torch.equal(call(pykern.optimal_token_baseline, small), call(pykern.optimal_token_baseline, wide))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("by_token", [False, True])
def test_opcheck(by_token):
    tensors = {name: tensor.nan_to_num(-0.5, 1.0, -2.0) for name, tensor in batch(7, 20).items()}
    arguments = [tensors[name] for name in ("returns", "logprobs", "sum_p2", "group_ids", "mask")]
    weights = tensors["importance_weights"] if by_token else None
    check_op(torch.ops.pykern.optimal_token_baseline.default, (*arguments, weights, by_token, True, 1e-8, False))


def test_compiles_whole_and_is_constant():
    tensors = batch(7, 20)
    function = lambda returns: call(pykern.optimal_token_baseline, tensors | {"returns": returns})  # noqa: E731
    assert torch.equal(compile_whole(function)(tensors["returns"]), function(tensors["returns"]))
    assert not function(tensors["returns"].requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"returns": [1.0]}, TypeError, "returns: expected a floating-point tensor, got list"),
        ({"returns": torch.ones(4)}, ValueError, r"returns: expected one per token, \[B, T\], got \[4\]"),
        ({"logprobs": torch.ones(2, 4)}, ValueError, r"logprobs: .* \[2, 3\], got \[2, 4\]"),
        ({"sum_p2": torch.ones(2, 3).long()}, TypeError, "sum_p2: .* got torch.int64"),
        ({"importance_weights": torch.ones(3, 2)}, ValueError, r"importance_weights: .* got \[3, 2\]"),
        ({"sum_p2": torch.ones(2, 3, device="meta")}, ValueError, "sum_p2: expected the device of returns, cpu"),
        ({"group_ids": torch.zeros(2)}, TypeError, "group_ids: .* got torch.float32"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"group_ids: .* \[2\], got \[3\]"),
        ({"mask": torch.ones(2)}, ValueError, r"mask: .* \[2, 3\], got \[2\]"),
        ({"align": "end"}, ValueError, "align: expected one of position, token, got 'end'"),
        ({"singleton": "one"}, ValueError, 'singleton: expected "zero" or "self", got'),
        ({"eps": -1.0}, ValueError, "eps: .* got -1.0"),
    ],
)
def test_refuses(change, error, message):
    tensors = {name: torch.ones(2, 3) for name in ("returns", "logprobs", "sum_p2")}
    tensors |= {"group_ids": torch.zeros(2, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        call(pykern.optimal_token_baseline, {"importance_weights": None} | tensors)
