"""policy_loss against its definition in float64: values, gradients, metrics, what must not be read, what is refused."""

import math
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pykern
from pykern.policy.losses import PRESETS
from tests.policy.loss_cases import arguments, batch, definition, ours, packed
from tests.support import assert_accurate, compile_whole, threads

LOSSES = list(pykern.LOSSES)
KLS = [None, *pykern.KL_ESTIMATORS]
SOME = ["grpo", "gspo", "cispo", "vespo", "gmpo"]
"""One loss of each kind of ratio, and a weight."""


def assert_matches(positional, named, **bounds):
    """Loss, gradients and metrics within the error of the definition in the same dtype."""
    dtype = torch.float64 if positional[0].dtype == torch.float64 else torch.float32
    exact, same = definition(positional, named), definition(positional, named, dtype)
    actual = ours(positional, named)
    assert actual[0].dtype == dtype and len(actual) == len(exact)
    for gradient, want, other in zip(actual[2:], exact[2:], same[2:]):
        assert gradient.dtype == positional[0].dtype
        assert_accurate(gradient, want, other.to(gradient.dtype), units=bounds.get("units", 4.0))
    terms = exact[2].abs().sum().item()  # the tokens' terms may cancel in a sum, their roundings do not
    for name, value, other, want in [
        ("loss", actual[0], same[0], exact[0]),
        *((name, actual[1][name], same[1][name], want) for name, want in exact[1].items()),
    ]:
        if want.isfinite():
            bound = 2 * (other - want).abs() + 16 * torch.finfo(dtype).eps * max(want.abs().item(), terms)
            assert (value.double() - want).abs() <= bound, name
        else:
            assert_accurate(value, want)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("loss", LOSSES)
def test_float64_matches_definition(loss, aggregate):
    assert_matches(*arguments(batch(), loss=loss, kl="k3", aggregate=aggregate), units=64.0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("gradient", pykern.KL_GRADIENTS)
@pytest.mark.parametrize("kl", pykern.KL_ESTIMATORS)
@pytest.mark.parametrize("loss", SOME)
def test_kl_estimates_match_definition(loss, kl, gradient):
    assert_matches(*arguments(batch(), loss=loss, kl=kl, kl_gradient=gradient, rollout=True), units=64.0)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_float32_matches_definition_on_each_level(loss, kl, cpu_level):
    assert_matches(*arguments(batch(dtype=torch.float32), loss=loss, kl=kl, rollout=kl == "k2"))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", SOME)
def test_low_precision_inputs(loss, dtype):
    assert_matches(*arguments(batch(dtype=dtype), loss=loss, kl="k3", extra=("entropy",)))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("count_empty", [False, True])
@pytest.mark.parametrize("loss", SOME)
def test_packed_matches_definition_and_padded(loss, count_empty, aggregate):
    tensors = batch()
    named = {"loss": loss, "kl": "k3", "aggregate": aggregate, "horizon": 37.0, "count_empty": count_empty}
    padded, together = arguments(tensors, **named), arguments(packed(tensors), **named)
    assert_matches(*together, units=64.0)
    wide, narrow = ours(*padded), ours(*together)
    torch.testing.assert_close(narrow[0], wide[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(narrow[2], wide[2][tensors["mask"]], rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_advantages_per_token(loss, dtype):
    assert_matches(*arguments(batch(dtype=dtype, per_token=True), loss=loss, kl="k1"), units=64.0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_packed_with_mask(loss):
    tensors = packed(batch(poisoned=False))
    tensors["mask"] = torch.rand(tensors["logprobs"].shape) < 0.5
    assert_matches(*arguments(tensors, loss=loss, kl="k2"), units=64.0)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("loss", LOSSES)
def test_masked_tokens_do_not_leak(loss):
    clean = batch(dtype=torch.float32, poisoned=False, per_token=True)
    dirty = {
        name: tensor.masked_fill(~clean["mask"], math.nan) if tensor.is_floating_point() else tensor
        for name, tensor in clean.items()
    }
    extra = ("entropy", "token_weights", "rollout_weights", "keep")
    first = ours(*arguments(clean, loss=loss, kl="k3", rollout=True, extra=extra))
    second = ours(*arguments(dirty, loss=loss, kl="k3", rollout=True, extra=extra))
    assert torch.equal(first[0], second[0])
    for before, after in zip(first[2:], second[2:]):
        assert torch.equal(before, after) and torch.count_nonzero(after[~clean["mask"]]) == 0
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("loss", SOME)
def test_unmasked_garbage_shows(loss, name, bad):
    tensors = batch(poisoned=False)
    tensors["mask"][0, 0] = True
    tensors[name][0, 0] = bad
    positional, named = arguments(tensors, loss=loss, kl="k3")
    assert ours(positional, named)[0].isfinite() == definition(positional, named)[0].isfinite()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("loss", pykern.LOSSES)
@pytest.mark.parametrize("dtype, apart", [(torch.float32, 100.0), (torch.float64, 800.0)], ids=str)
def test_what_counts_for_nothing_is_nothing_where_its_ratio_overflows(loss, dtype, apart):
    tensors = batch(dtype=dtype, poisoned=False)
    tensors["mask"][:] = True
    for name in ("advantages", "second_advantages"):
        tensors[name][0] = 0
    for name, moved in (("old_logprobs", -apart), ("ref_logprobs", apart)):
        tensors[name][0] = tensors["logprobs"][0] + moved
    value, _, *gradients = ours(*arguments(tensors, loss=loss, kl="k3", kl_coef=0.0))
    assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("everywhere")
def test_no_hidden_clamp_and_the_preset_of_verl():
    logprobs = torch.tensor([[-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[-26.0, -26.0]], dtype=torch.float64)
    call = lambda **keywords: pykern.policy_loss(logprobs, other, -torch.ones(1).double(), **keywords)[0]  # noqa: E731
    assert call().item() == pytest.approx(math.exp(25))
    assert call(preset="verl", dual_clip=math.inf).item() == pytest.approx(math.exp(20))
    assert call(preset="verl").item() == pytest.approx(3.0)
    assert call(loss="gspo", preset="verl").item() == pytest.approx(math.exp(10))
    away = {"kl": "k3", "kl_coef": 1.0, "ref_logprobs": logprobs.detach() + 25, "clip_high": 0.0}
    zero = torch.zeros(1, dtype=torch.float64)
    free = pykern.policy_loss(logprobs, None, zero, **away)[0]
    held = pykern.policy_loss(logprobs, None, zero, preset="verl", **away)[0]
    assert free.item() == pytest.approx(math.exp(25) - 26)
    assert held.item() == 10.0
    assert torch.autograd.grad(held, logprobs)[0].tolist() == [[0.0, 0.0]]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "loss, preset",
    [
        *((loss, "verl") for loss in LOSSES),
        *((loss, preset) for loss in SOME for preset in PRESETS if preset not in (None, "verl", "roll")),
    ],
)
def test_presets_match_definition(loss, preset):
    tensors = batch(spread=9.0)
    if loss in ("topr", "vespo"):
        tensors = batch(spread=3.0)
    assert_matches(*arguments(tensors, loss=loss, kl="k3", preset=preset), units=64.0)


@pytest.mark.usefixtures("everywhere")
def test_preset_of_roll_derives_its_dual_clip_from_the_clip():
    positional, named = arguments(batch(spread=3.0))
    ours_of = lambda **keywords: ours(positional, named | keywords)  # noqa: E731
    for keywords, bound in (({}, 1.4), ({"clip_low": 0.3}, 1.6)):
        expected = ours_of(dual_clip=bound, **keywords)
        actual = ours_of(preset="roll", **keywords)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])


@pytest.mark.usefixtures("everywhere")
def test_closed_form_of_a_clipped_token():
    logprobs = torch.tensor([[0.5, -0.5, 0.1, 0.5]], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, 4, dtype=torch.float64)
    advantages = torch.tensor([[2.0, 2.0, -1.0, -1.0]], dtype=torch.float64)
    loss, metrics = pykern.policy_loss(logprobs, old, advantages, loss="dapo", aggregate="token-sum", dual_clip=1.5)
    loss.backward()
    assert loss.item() == pytest.approx(-2 * 1.28 - 2 * math.exp(-0.5) + math.exp(0.1) + 1.5)
    expected = torch.tensor([[0.0, -2 * math.exp(-0.5), math.exp(0.1), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, expected)
    assert metrics["clip_fraction"] == metrics["clip_fraction_high"] == metrics["dual_clip_fraction"] == 0.25
    assert metrics["clip_fraction_low"] == 0


@pytest.mark.usefixtures("everywhere")
def test_the_only_bound_of_a_weight_may_lie_below_one():
    tensors = batch(poisoned=False)
    logprobs, old, advantages, mask = (tensors[name] for name in ("logprobs", "old_logprobs", "advantages", "mask"))
    loss, _ = pykern.policy_loss(logprobs, old, advantages, mask=mask, loss="cispo", clip_high=-0.1)
    weights = (logprobs - old).exp().clamp(max=0.9)
    torch.testing.assert_close(loss, -(weights * advantages[:, None] * logprobs)[mask].mean())


def test_small_kl_keeps_its_digits():
    """exp(-d) + d - 1 at d = 1e-4 has no correct digit left in plain float32."""
    logprobs = torch.full((1, 9), -1.0, requires_grad=True)
    reference = logprobs.detach() - 2.0**-13
    _, metrics = pykern.policy_loss(logprobs, None, torch.zeros(1), kl="k3", kl_coef=1.0, ref_logprobs=reference)
    assert metrics["kl"].item() == pytest.approx(math.expm1(-(2.0**-13)) + 2.0**-13, rel=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_parts_of_a_batch_add_up():
    tensors = batch(8, 20)
    positional, named = arguments(tensors, kl="k3")
    for aggregate, count in (
        ("token-mean", tensors["mask"].sum()),
        ("seq-mean-token-mean", tensors["mask"].any(1).sum()),
    ):
        whole = ours(positional, named | {"aggregate": aggregate})
        parts = []
        for rows in (slice(0, 3), slice(3, 8)):
            cut = {name: value[rows] if torch.is_tensor(value) else value for name, value in named.items()}
            cut |= {"aggregate": aggregate, "denominator": int(count)}
            parts.append(ours(tuple(tensor[rows] for tensor in positional), cut))
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
        torch.testing.assert_close(torch.cat([parts[0][2], parts[1][2]]), whole[2])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("loss", LOSSES)
def test_without_old_logprobs_the_ratio_is_one(loss):
    positional, named = arguments(batch(poisoned=False), loss=loss)
    logprobs = positional[0].clone().requires_grad_()
    _, metrics = pykern.policy_loss(logprobs, None, positional[2], **named)
    assert metrics["ratio_mean"].item() == pytest.approx(1.0, rel=1e-15)
    assert metrics["clip_fraction"] == 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("loss", SOME)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (1, 1), (1, 3), (2, 16), (3, 17)])
def test_sizes(shape, loss, aggregate):
    positional, named = arguments(batch(*shape, dtype=torch.float32, poisoned=False), loss=loss, aggregate=aggregate)
    value, _, gradient = ours(positional, named)
    expected = definition(positional, named)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("everywhere")
def test_everything_masked():
    positional, named = arguments(batch())
    named["mask"] = torch.zeros_like(named["mask"])
    value, metrics, gradient = ours(positional, named)
    assert value == 0 and torch.count_nonzero(gradient) == 0
    assert all(metric == 0 for metric in metrics.values())


@pytest.mark.parametrize("loss", SOME)
def test_long_sequences_same_bits_on_any_threads(loss):
    positional, named = arguments(batch(3, 20011, dtype=torch.float32), loss=loss, kl="k3")
    with threads(1):
        first = ours(positional, named)
    for count in (2, 3):
        with threads(count):
            again = ours(positional, named)
        assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert_matches(positional, named)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_strided_inputs(loss):
    positional, named = arguments(batch(dtype=torch.float32), loss=loss, kl="k3")
    expected = ours(positional, named)
    turned = lambda tensor: tensor.t().contiguous().t() if torch.is_tensor(tensor) and tensor.dim() == 2 else tensor  # noqa: E731
    actual = ours(tuple(map(turned, positional)), {name: turned(value) for name, value in named.items()})
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[2], expected[2])


@pytest.mark.usefixtures("everywhere")
def test_mask_and_offset_types():
    positional, named = arguments(batch(), loss="gspo")
    expected = ours(positional, named)
    for dtype in (torch.uint8, torch.int64, torch.float32, torch.bfloat16):
        assert torch.equal(ours(positional, named | {"mask": named["mask"].to(dtype)})[2], expected[2])
    positional, named = arguments(packed(batch()))
    expected = ours(positional, named)
    assert torch.equal(ours(positional, named | {"cu_seqlens": named["cu_seqlens"].int()})[0], expected[0])


@pytest.mark.usefixtures("everywhere")
def test_gradient_scales_and_only_logprobs_get_one():
    positional, named = arguments(batch(poisoned=False), kl="k3")
    leaves = [tensor.clone().requires_grad_() for tensor in positional]
    loss, metrics = pykern.policy_loss(*leaves, **named)
    (3 * loss).backward()
    torch.testing.assert_close(leaves[0].grad, 3 * ours(positional, named)[2])
    assert leaves[1].grad is None and leaves[2].grad is None
    assert not any(metric.requires_grad for metric in metrics.values())
    with torch.no_grad():
        assert torch.equal(pykern.policy_loss(*leaves, **named)[0], loss)


@pytest.mark.usefixtures("everywhere")
def test_float32_advantages_beside_bfloat16_logprobs_keep_their_digits():
    logprobs = torch.zeros(1, 4, dtype=torch.bfloat16)
    loss, _ = pykern.policy_loss(logprobs, None, torch.tensor([1.0009765625]))
    assert loss.item() == -1.0009765625


@pytest.mark.usefixtures("everywhere")
def test_token_weights_stand_for_each_aggregate():
    tensors = batch(dtype=torch.float32)
    for aggregate in pykern.AGGREGATES:
        for count_empty in (False, True):
            named = {"aggregate": aggregate, "count_empty": count_empty, "horizon": 50.0}
            for form in (tensors, packed(tensors)):
                places = {name: form[name] for name in ("mask", "cu_seqlens") if name in form}
                weights = pykern.policy_loss_token_weights(form["logprobs"], **places, **named)
                if "mask" in form:
                    assert torch.count_nonzero(weights[~form["mask"]]) == 0
                expected = ours(*arguments(form, kl="k3", extra=("entropy",), **named))
                actual = ours(
                    *arguments(form | {"token_weights": weights}, kl="k3", extra=("entropy", "token_weights"))
                )
                torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
                for got, want in zip(actual[2:], expected[2:]):
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("form", [lambda tensors: tensors, packed])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "lp_reg", "hapo", "copo"])
def test_compiles_whole(loss, form):
    positional, named = arguments(form(batch(dtype=torch.float32)), loss=loss, kl="k3")
    expected = ours(positional, named)
    logprobs = positional[0].clone().requires_grad_()
    value, metrics = compile_whole(lambda logprobs: pykern.policy_loss(logprobs, *positional[1:], **named))(logprobs)
    value.backward()
    assert torch.equal(value, expected[0]) and torch.equal(logprobs.grad, expected[2])
    assert torch.equal(metrics["clip_fraction"], expected[1]["clip_fraction"])


def test_cuda_tensors_without_cuda_kernels_get_one_clear_line(monkeypatch):
    monkeypatch.setattr(pykern._native, "cuda_unavailable_reason", "this build of pykern has no CUDA kernels")
    with FakeTensorMode():
        logprobs, advantages = torch.empty(2, 3, device="cuda"), torch.empty(2, device="cuda")
        ids = torch.empty(2, device="cuda", dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="is on cuda:0, but this build .* no CUDA kernels; move"):
        pykern.policy_loss(logprobs, logprobs, advantages)
    with pytest.raises(NotImplementedError, match="is on cuda:0, but this build .* no CUDA kernels; move"):
        pykern.group_advantages(advantages, ids)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("loss", ["grpo", "sapo", "bnpo", "dr_grpo", "dapo", "luspo"])
def test_normalisers_of_trl(loss):
    """Sums over rows and tokens that TRL divides by, an empty row among them."""
    positional, named = arguments(batch(poisoned=False), loss=loss)
    mask, width, items = named["mask"], 64, 91
    _, _, gradient = ours(positional, named | {"aggregate": "token-sum"})
    row_counts = mask.sum(1, keepdim=True).clamp(min=1)
    divisor, keywords = {
        "grpo": (row_counts * len(mask), {"aggregate": "seq-mean-token-mean", "count_empty": True}),
        "sapo": (row_counts * len(mask), {"aggregate": "seq-mean-token-mean", "count_empty": True}),
        "bnpo": (mask.sum().clamp(min=1), {"aggregate": "token-mean"}),
        "dr_grpo": (len(mask) * width, {"aggregate": "seq-mean-token-sum-norm", "count_empty": True, "horizon": width}),
        "dapo": (items, {"aggregate": "token-mean", "denominator": items}),
        "luspo": (len(mask), {"aggregate": "seq-mean-token-sum", "count_empty": True}),
    }[loss]
    torch.testing.assert_close(ours(positional, named | keywords)[2], gradient / divisor)


def test_rows_name_their_source_and_functions_that_exist():
    for name, row in pykern.LOSSES.items():
        assert re.fullmatch(r"(arXiv \d{4}\.\d{5}(, \d{4}\.\d{5})*|doi \S+)", row.paper), name
        for source in row.needs.values():
            for function in re.findall(r"pykern\.(\w+)", source):
                assert callable(getattr(pykern, function)), function
