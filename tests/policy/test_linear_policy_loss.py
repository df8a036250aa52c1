"""linear_policy_loss: each way it takes against the definition, and what may not be read."""

import math

import pytest
import torch

import pykern
from pykern.reference import policy_logprobs as reference
from tests.policy.loss_cases import TOKENS, arguments, batch, definition, packed
from tests.support import assert_accurate, assert_grads, check_op, compile_whole, poison, threads

EVERYTHING = {"temperature": 0.8, "softcap": 3.0}


def make(rows=11, columns=60, hidden_size=24, vocabulary=401, dtype=torch.float32, bias=False, **keywords):
    """A batch as for policy_loss whose log-probabilities are those of a head, and the head."""
    tensors = batch(rows, columns, poisoned=False, **keywords)
    hidden = torch.randn(rows, columns, hidden_size).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size) / hidden_size**0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows, columns))
    bias = torch.randn(vocabulary).to(dtype) if bias else None
    logprobs = reference.linear_token_logprobs(
        hidden.double().flatten(0, 1), weight.double(), targets.flatten(), bias=None if bias is None else bias.double()
    ).view(rows, columns)
    shift = logprobs - tensors["logprobs"]
    tensors |= {name: tensors[name] + shift for name in TOKENS}
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    # What is masked is not read.
    masked = ~tensors["mask"]
    poison(tensors["old_logprobs"])[~masked] = (tensors["logprobs"] + 0.3 * torch.randn(rows, columns))[~masked]
    hidden[masked] = torch.nan
    targets[masked] = torch.randint(-5, 10**6, (int(masked.sum()),))
    return {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets}, tensors


def workspace(weight, rows=None):
    """As many bytes as leave room for chunks of `rows` rows; by default for one chunk of all of them."""
    if rows is None:
        return 512 << 20
    per_row = (4 + weight.element_size()) * (-(-weight.shape[0] // 192) * 192)
    return (80 << 20) + 4 * weight.shape[0] * (-(-weight.shape[1] // 64) * 64) + rows * per_row


def run(head, positional, named, **keywords):
    """Loss, metrics, gradients of hidden, weight and bias, and whether the logits were made once."""
    leaves = {
        name: head[name].clone().requires_grad_() for name in ("hidden", "weight", "bias") if head[name] is not None
    }
    loss, metrics = pykern.linear_policy_loss(
        leaves["hidden"],
        leaves["weight"],
        head["targets"],
        *positional[1:],
        bias=leaves.get("bias"),
        **named,
        **keywords,
    )
    once = "LinearPolicyLoss" in type(loss.grad_fn).__name__
    loss.backward()
    assert_grads(leaves)
    return loss.detach(), metrics, [leaf.grad for leaf in leaves.values()], once


def exact(head, positional, named, **keywords):
    """Loss and gradients by the definitions in float64."""
    leaves = [head[name].double().requires_grad_() for name in ("hidden", "weight", "bias") if head[name] is not None]
    mask = named["mask"] if "mask" in named else torch.ones_like(head["targets"], dtype=torch.bool)
    targets = torch.where(mask, head["targets"], -100).flatten()
    results = reference.linear_token_logprobs(
        leaves[0].flatten(0, -2),
        leaves[1],
        targets,
        bias=leaves[2] if len(leaves) > 2 else None,
        entropy=True,
        **keywords,
    )
    results = [result.view(mask.shape) for result in results]
    named = dict(named)
    if named.get("entropy_coef"):
        named["entropy"] = results[1].detach()
    loss, _, *gradients = definition((results[0].detach(), *positional[1:]), named)
    torch.autograd.backward(results[: len(gradients)], gradients)
    return loss, [leaf.grad for leaf in leaves]


def check(head, positional, named, *, once=True, rows=256, units=8, **keywords):
    loss, metrics, grads, is_once = run(
        head, positional, named, workspace_bytes=workspace(head["weight"], rows), **keywords
    )
    assert is_once == once
    want, want_grads = exact(head, positional, named, **keywords)
    assert_accurate(loss, want, units=64)
    for grad, wanted, leaf in zip(
        grads, want_grads, [head[n] for n in ("hidden", "weight", "bias") if head[n] is not None]
    ):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert_accurate(grad, wanted, units=units)
    # The other way: the same bits wherever no sum over chunks is taken; a softcap is then undone from the logit.
    other_loss, other_metrics, other_grads, is_once = run(head, positional, named, workspace_bytes=0, **keywords)
    assert not is_once and torch.equal(loss, other_loss)
    assert "softcap" in keywords or torch.equal(grads[0], other_grads[0])
    assert metrics.keys() == other_metrics.keys()
    assert all(torch.equal(metrics[name], other_metrics[name]) for name in metrics)


@pytest.mark.parametrize("loss", list(pykern.LOSSES))
def test_every_loss(loss):
    head, tensors = make()
    check(head, *arguments(tensors, loss=loss), once=pykern.LOSSES[loss].ratio == "token", units=32)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_ratio_in_place_of_the_rows(ratio):
    head, tensors = make()
    check(head, *arguments(tensors, loss="grpo", ratio=ratio), once=ratio == "token", units=32)


@pytest.mark.parametrize("aggregate", pykern.AGGREGATES)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_aggregates_with_kl_and_entropy(aggregate, form):
    head, tensors = make(per_token=form == "packed")
    if form == "packed":
        mask = tensors["mask"]
        head |= {"hidden": head["hidden"][mask], "targets": head["targets"][mask]}
        tensors = packed(tensors)
    positional, named = arguments(
        tensors, loss="dapo", kl="k3", rollout=True, aggregate=aggregate, horizon=70, entropy_coef=0.05
    )
    check(head, positional, named, units=32)


@pytest.mark.parametrize("dtype, units", [(torch.float32, 32), (torch.bfloat16, 4)], ids=str)
def test_everything_at_every_level(cpu_level, dtype, units):
    head, tensors = make(6, 60, 39, 407, dtype, bias=True)
    check(head, *arguments(tensors, entropy_coef=0.1), units=units, rows=64 * 4, **EVERYTHING)


def test_bfloat16_in_one_chunk():
    head, tensors = make(dtype=torch.bfloat16, bias=True)
    check(head, *arguments(tensors), rows=None, units=4)


def test_temperature_of_each_token():
    head, tensors = make()
    temperature = torch.where(tensors["mask"], 0.5 + torch.rand(tensors["mask"].shape), 0.0)  # 0 is not read
    positional, named = arguments(tensors)
    once = run(head, positional, named, temperature=temperature, workspace_bytes=workspace(head["weight"], 256))
    twice = run(head, positional, named, temperature=temperature, workspace_bytes=0)
    assert once[3] and not twice[3]
    assert torch.equal(once[0], twice[0]) and torch.equal(once[2][0], twice[2][0])
    assert_accurate(once[2][1], twice[2][1].double(), units=32)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_gradient_alone(wanted):
    head, tensors = make(bias=True)
    positional, named = arguments(tensors)
    *_, grads, once = run(head, positional, named)
    leaves = {name: head[name].clone().requires_grad_(name == wanted) for name in ("hidden", "weight", "bias")}
    pykern.linear_policy_loss(
        leaves["hidden"], leaves["weight"], head["targets"], *positional[1:], bias=leaves["bias"], **named
    )[0].backward()
    assert once and torch.equal(leaves[wanted].grad, grads[["hidden", "weight", "bias"].index(wanted)])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_gradient_is_scaled_once():
    head, tensors = make()
    positional, named = arguments(tensors)
    _, _, grads, _ = run(head, positional, named)
    hidden = head["hidden"].clone().requires_grad_()
    loss, _ = pykern.linear_policy_loss(hidden, head["weight"], head["targets"], *positional[1:], **named)
    (4 * loss).backward(retain_graph=True)
    assert torch.equal(hidden.grad, 4 * grads[0])
    with pytest.raises(RuntimeError, match="the first backward has taken the gradients; .* pass workspace_bytes=0"):
        loss.backward()


def test_value_alone():
    head, tensors = make()
    positional, named = arguments(tensors)
    loss, metrics = pykern.linear_policy_loss(head["hidden"], head["weight"], head["targets"], *positional[1:], **named)
    want, want_metrics, *_ = run(head, positional, named)
    assert not loss.requires_grad and torch.equal(loss, want)
    assert all(torch.equal(metrics[name], want_metrics[name]) for name in metrics)


def test_on_the_policy():
    head, tensors = make()
    positional, named = arguments(tensors)
    loss, metrics, grads, once = run(head, (None, None, positional[2]), named)
    assert once and metrics["ratio_mean"] == 1 and grads[0].any()


@pytest.mark.parametrize("mask", ["none", "nothing"])
def test_nothing_to_learn_from(mask):
    head, tensors = make(3, 5)
    named = {} if mask == "none" else {"mask": torch.zeros(3, 5, dtype=torch.bool)}
    rows = 0 if mask == "none" else 3
    head |= {"hidden": head["hidden"][:rows], "targets": head["targets"][:rows]}
    loss, metrics, grads, once = run(head, (None, tensors["old_logprobs"][:rows], tensors["advantages"][:rows]), named)
    assert once and loss == 0 and all(not grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_types_take_two_steps(dtype):
    head, tensors = make(dtype=dtype)
    *_, once = run(head, *arguments(tensors))
    assert not once


def test_gradcheck():
    head, tensors = make(2, 3, 4, 7, torch.float64)
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    hidden = head["hidden"].nan_to_num().requires_grad_()
    _, old, advantages = arguments(tensors)[0]
    old = old.nan_to_num()
    assert torch.autograd.gradcheck(
        lambda h, w: pykern.linear_policy_loss(
            h, w, head["targets"], old, advantages, mask=tensors["mask"], entropy_coef=0.1, softcap=2.0
        )[0],
        (hidden, head["weight"].requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    head, tensors = make(20, 60, 40, 1700, dtype)
    positional, named = arguments(tensors, entropy_coef=0.1)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(run(head, positional, named, workspace_bytes=workspace(head["weight"], 256)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip([found[0][0], *found[0][2]], [other[0], *other[2]]))


# --- the ops ----------------------------------------------------------------------------------------


def chunk(rows, hidden_size, vocabulary, dtype):
    hidden = torch.randn(rows, hidden_size).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size) / max(hidden_size, 1) ** 0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    targets[1::9] = -100
    logits = poison(torch.empty(-(-rows // 64) * 64, -(-vocabulary // 192) * 192))
    return hidden, weight, targets, logits


def sums(weight):
    shape = (weight.shape[0], -(-weight.shape[1] // 64) * 64)
    return torch.zeros(shape), torch.zeros(weight.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("rows, hidden_size, vocabulary", [(1, 1, 1), (200, 33, 401), (150, 64, 1730), (64, 300, 192)])
def test_rows_without_gradient_leave_the_products(dtype, softcap, rows, hidden_size, vocabulary):
    hidden, weight, targets, logits = chunk(rows, hidden_size, vocabulary, dtype)
    bias, temperature = torch.randn(vocabulary).double(), torch.rand(rows).double() + 0.5
    given = (weight, targets, bias, temperature, 1.0, softcap)
    results = torch.ops.pykern.linear_chunk_logprobs.default(hidden, *given, True, logits)
    want = torch.ops.pykern.linear_token_logprobs.default(hidden, *given, True, 0)
    assert all(torch.equal(a, b) for a, b in zip(results, want))
    grads = [torch.randn(rows) for _ in range(2)]
    for grad in grads:
        grad[::3] = 0
        grad[rows // 2 :][: rows // 3] = 0
    hidden = torch.where((grads[0] == 0).unsqueeze(1), torch.nan, hidden)
    weight_sums, bias_sums = sums(weight)
    grad_hidden = torch.ops.pykern.linear_chunk_gradients.default(
        hidden, *given, results[2], results[1], *grads, logits, weight_sums, bias_sums, True
    )
    wanted = torch.ops.pykern.linear_token_logprobs_backward.default(
        hidden, *given, results[2], results[1], *grads, 0, True, True, True
    )
    assert softcap or torch.equal(grad_hidden, wanted[0])
    assert_accurate(grad_hidden, wanted[0].double(), units=4)
    # grad_bias, in float64, is the sum of gradients of the type of hidden.
    units = 4 * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    assert_accurate(weight_sums[:, :hidden_size].to(dtype), wanted[1].double(), units=4)
    assert_accurate(bias_sums, wanted[2], units=units)
    # A second time: added.
    torch.ops.pykern.linear_chunk_gradients.default(
        hidden, *given, results[2], results[1], *grads, logits, weight_sums, bias_sums, False
    )
    assert_accurate(weight_sums[:, :hidden_size].to(dtype), 2 * wanted[1].double(), units=4)
    assert_accurate(bias_sums, 2 * wanted[2], units=units)


def test_gradient_of_the_weight_straight(everywhere):
    """Into bfloat16, of the rows of one chunk alone: rounded once."""
    hidden, weight, targets, logits = chunk(90, 24, 401, torch.bfloat16)
    given = (hidden, weight, targets, None, None, 1.0, 0.0)
    found = []
    for grad_weight in (torch.zeros(401, 64), torch.zeros(401, 24, dtype=torch.bfloat16)):
        _, entropies, statistics = torch.ops.pykern.linear_chunk_logprobs.default(*given, False, logits)
        torch.ops.pykern.linear_chunk_gradients.default(
            *given, statistics, entropies, torch.ones(90), None, logits, grad_weight, None, False
        )
        found.append(grad_weight[:, :24])
    assert found[1].any()
    assert_accurate(found[1], found[0].double(), units=1)


@pytest.mark.parametrize("everything", [True, False])
def test_opcheck(everything):
    hidden, weight, targets, logits = chunk(6, 10, 40, torch.bfloat16)
    logits.zero_()
    bias = torch.randn(40, dtype=torch.float64) if everything else None
    temperature = torch.rand(6, dtype=torch.float64) + 0.5 if everything else None
    given = (hidden, weight, targets, bias, temperature, 1.0, 3.0)
    check_op(torch.ops.pykern.linear_chunk_logprobs.default, (*given, everything, logits))
    _, entropy, statistics = torch.ops.pykern.linear_chunk_logprobs.default(*given, everything, logits)
    grad = torch.randn(6)
    rest = (statistics, entropy, grad, grad if everything else None, logits, *sums(weight), everything)
    check_op(torch.ops.pykern.linear_chunk_gradients.default, (*given, *rest))


# --- compiled, and refused --------------------------------------------------------------------------


def test_compiles_whole():
    head, tensors = make(3, 6, 8, 30)
    _, old, advantages = arguments(tensors)[0]
    old = old.nan_to_num()

    def function(hidden, weight):
        return pykern.linear_policy_loss(
            hidden, weight, head["targets"], old, advantages, mask=tensors["mask"], entropy_coef=0.1
        )[0]

    found = []
    for call in (function, compile_whole(function)):
        leaves = [head["hidden"].clone().requires_grad_(), head["weight"].clone().requires_grad_()]
        loss = call(*leaves)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert_accurate(found[1][2], found[0][2].double(), units=8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": torch.zeros(6, 4)}, ValueError, r"hidden: expected shape \[B, T, H\], or \[N, H\] with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"hidden: expected shape \[N, H\] beside cu_seqlens"),
        ({"targets": torch.zeros(2, 4).long()}, ValueError, r"targets: expected shape \[2, 3\], .* got \[2, 4\]"),
        ({"targets": torch.full((2, 3), 5)}, ValueError, "targets: expected values below the vocabulary size 5, got 5"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight: expected shape \[V, 4\], got \[5, 3\]"),
        ({"mask": torch.ones(3)}, ValueError, r"mask: expected a tensor of the shape of targets, \[2, 3\], got \[3\]"),
        ({"entropy": torch.ones(2, 3)}, ValueError, "entropy: expected None, as its values arise here"),
        ({"token_weights": torch.ones(2, 3)}, ValueError, "token_weights: expected None"),
        ({"workspace_bytes": -1}, ValueError, "workspace_bytes: expected an integer of at least 0, got -1"),
        ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs: expected the shape of logprobs, \[2, 3\]"),
        ({"loss": "none"}, ValueError, "loss: expected one of"),
        ({"softcap": math.inf}, ValueError, "softcap: expected a positive finite number or None"),
    ],
)
def test_refuses(change, error, message):
    given = {
        "hidden": torch.zeros(2, 3, 4, requires_grad=True),
        "weight": torch.zeros(5, 4),
        "targets": torch.zeros(2, 3, dtype=torch.int64),
        "old_logprobs": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
    }
    with pytest.raises(error, match=message) as raised:
        pykern.linear_policy_loss(**given | change)
    assert "\n" not in str(raised.value)
