"""policy_loss against its definition in float64: values, gradients, metrics, what must not be read, what is refused."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pykern
from tests.policy.loss_cases import arguments, batch, definition, ours, packed
from tests.support import assert_accurate, check_op, compile_whole, threads

LOSSES = list(pykern.LOSSES)
KLS = [None, *pykern.KL_ESTIMATORS]


def assert_matches(positional, named, **bounds):
    """Loss, gradient and metrics within the error of the definition in the same dtype."""
    dtype = torch.float64 if positional[0].dtype == torch.float64 else torch.float32
    exact, same = definition(positional, named), definition(positional, named, dtype)
    actual = ours(positional, named)
    assert actual[0].dtype == dtype and actual[2].dtype == positional[0].dtype
    assert_accurate(actual[2], exact[2], same[2].to(positional[0].dtype), units=bounds.get("units", 4.0))
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
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_float64_matches_definition(loss, kl, aggregate):
    assert_matches(*arguments(batch(), loss=loss, kl=kl, aggregate=aggregate), units=64.0)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_float32_matches_definition_on_each_level(loss, kl, cpu_level):
    assert_matches(*arguments(batch(dtype=torch.float32), loss=loss, kl=kl, rollout=kl == "k2"))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo"])
def test_low_precision_inputs(loss, dtype):
    assert_matches(*arguments(batch(dtype=dtype), loss=loss, kl="k3"))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("loss", ["grpo", "dual_clip", "cispo", "gspo"])
def test_packed_matches_definition_and_padded(loss, aggregate):
    tensors = batch()
    named = {"loss": loss, "kl": "k3", "aggregate": aggregate, "horizon": 37.0}
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


@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cispo"])
def test_gradcheck(loss, kl, aggregate):
    """A CISPO weight is constant, so differences of its value are not its gradient; see the next test."""
    tensors = batch(3, 5, poisoned=False, spread=0.1)
    positional, named = arguments(tensors, loss=loss, kl=kl, rollout=kl == "k1", aggregate=aggregate)
    logprobs = positional[0].clone().requires_grad_()
    function = lambda logprobs: pykern.policy_loss(logprobs, *positional[1:], **named)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (logprobs,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("kl", KLS)
def test_gradcheck_of_cispo_with_its_weight_held(kl, aggregate):
    """With all ratios clipped, the weight is constant in truth and differences show the gradient."""
    tensors = batch(3, 5, poisoned=False)
    tensors["old_logprobs"] = tensors["logprobs"] - 2
    positional, named = arguments(tensors, loss="cispo", kl=kl, aggregate=aggregate, clip_high=0.5)
    logprobs = positional[0].clone().requires_grad_()
    function = lambda logprobs: pykern.policy_loss(logprobs, *positional[1:], **named)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, (logprobs,), eps=1e-7, atol=1e-6)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("loss", LOSSES)
def test_masked_tokens_do_not_leak(loss):
    clean = batch(dtype=torch.float32, poisoned=False, per_token=True)
    dirty = {
        name: tensor if name == "mask" else tensor.masked_fill(~clean["mask"], math.nan)
        for name, tensor in clean.items()
    }
    first = ours(*arguments(clean, loss=loss, kl="k3", rollout=True))
    second = ours(*arguments(dirty, loss=loss, kl="k3", rollout=True))
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert torch.count_nonzero(second[2][~clean["mask"]]) == 0
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs"])
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_unmasked_garbage_shows(loss, name, bad):
    tensors = batch(poisoned=False)
    tensors["mask"][0, 0] = True
    tensors[name][0, 0] = bad
    positional, named = arguments(tensors, loss=loss, kl="k3")
    assert ours(positional, named)[0].isfinite() == definition(positional, named)[0].isfinite()


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
@pytest.mark.parametrize("loss", LOSSES)
def test_preset_of_verl_matches_definition(loss):
    assert_matches(*arguments(batch(spread=9.0), loss=loss, kl="k3", preset="verl"), units=64.0)


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
@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo"])
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


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
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
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_opcheck(loss):
    row = pykern.LOSSES[loss]
    tensors = batch(2, 9, dtype=torch.float32, poisoned=False)
    settings = [1 - row.clip_low, 1 + row.clip_high, *[math.inf] * 3, 0.1, math.inf, math.inf, 2.0, 0.0, 1.0]
    head = tuple(tensors[name] for name in ("logprobs", "old_logprobs", "advantages", "mask"))
    for gradient in (True, False):
        check_op(
            torch.ops.pykern.policy_loss_forward.default,
            (*head, None, tensors["ref_logprobs"], None, loss == "gspo", False, 3, 0, settings, gradient),
        )
    check_op(torch.ops.pykern.policy_loss_backward.default, (torch.tensor(2.0), torch.randn(3, 4)))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("form", [lambda tensors: tensors, packed])
@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo"])
def test_compiles_whole(loss, form):
    positional, named = arguments(form(batch(dtype=torch.float32)), loss=loss, kl="k3")
    expected = ours(positional, named)
    logprobs = positional[0].clone().requires_grad_()
    value, metrics = compile_whole(lambda logprobs: pykern.policy_loss(logprobs, *positional[1:], **named))(logprobs)
    value.backward()
    assert torch.equal(value, expected[0]) and torch.equal(logprobs.grad, expected[2])
    assert torch.equal(metrics["clip_fraction"], expected[1]["clip_fraction"])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logprobs": 1.0}, TypeError, "logprobs: expected a floating-point tensor, got float"),
        ({"logprobs": torch.zeros(3)}, ValueError, r"logprobs: expected \[B, T\], got \[3\]; packed .* cu_seqlens"),
        ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs: .* \[2, 3\], got \[2, 4\]"),
        ({"old_logprobs": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "old_logprobs: .* got torch.int64"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages: .* \[2\], or per token, \[2, 3\], got \[3\]"),
        ({"mask": torch.ones(3, 2)}, ValueError, r"mask: expected the shape of logprobs, \[2, 3\]"),
        ({"mask": [1]}, TypeError, "mask: expected a tensor, got list"),
        ({"loss": "grop"}, ValueError, "loss: expected one of ppo, .* got 'grop'"),
        ({"aggregate": "mean"}, ValueError, "aggregate: expected one of token-mean, .* got 'mean'"),
        ({"kl": "k4", "ref_logprobs": torch.zeros(2, 3)}, ValueError, "kl: expected None or one of k1, k2, k3"),
        ({"kl": "k3"}, ValueError, "ref_logprobs: kl='k3' needs"),
        ({"kl_coef": 0.1}, ValueError, "kl: expected k1, k2 or k3"),
        ({"clip_low": -0.1}, ValueError, "clip_low: .* got -0.1"),
        ({"clip_high": float("nan")}, ValueError, "clip_high: .* got nan"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip: expected a ratio above 1"),
        ({"rollout_clip": 0.0}, ValueError, "rollout_clip: expected a positive weight"),
        ({"denominator": 0}, ValueError, "denominator: expected a positive count"),
        ({"horizon": -1}, ValueError, "horizon: expected a positive number"),
        ({"preset": "nemo"}, ValueError, "preset: expected one of None, verl, trl"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens: .* got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: .* padded .* take a mask"),
    ],
)
def test_refuses(change, error, message):
    named = {"logprobs": torch.zeros(2, 3), "old_logprobs": torch.zeros(2, 3), "advantages": torch.zeros(2)} | change
    positional = [named.pop(name) for name in ("logprobs", "old_logprobs", "advantages")]
    with pytest.raises(error, match=message):
        pykern.policy_loss(*positional, **named)


@pytest.mark.parametrize("offsets", [[0, 4, 3], [1, 3], [0, 2], [0, 3, 2, 3]])
def test_refuses_offsets_that_do_not_cover(offsets):
    logprobs = torch.zeros(3)
    with pytest.raises(RuntimeError, match="cu_seqlens: expected"):
        pykern.policy_loss(logprobs, logprobs, logprobs, cu_seqlens=torch.tensor(offsets))


def test_refuses_a_missing_horizon():
    logprobs = torch.zeros(3)
    with pytest.raises(ValueError, match="horizon: .* packed sequences needs it"):
        pykern.policy_loss(logprobs, logprobs, logprobs, cu_seqlens=torch.tensor([0, 3]), loss="dr_grpo")


def test_cuda_tensors_without_cuda_kernels_get_one_clear_line(monkeypatch):
    monkeypatch.setattr(pykern._native, "cuda_unavailable_reason", "this build of pykern has no CUDA kernels")
    with FakeTensorMode():
        logprobs, advantages = torch.empty(2, 3, device="cuda"), torch.empty(2, device="cuda")
        ids = torch.empty(2, device="cuda", dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="is on cuda:0, but this build .* no CUDA kernels; move"):
        pykern.policy_loss(logprobs, logprobs, advantages)
    with pytest.raises(NotImplementedError, match="is on cuda:0, but this build .* no CUDA kernels; move"):
        pykern.group_advantages(advantages, ids)
