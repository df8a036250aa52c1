"""The CUDA side of linear_token_logprobs: products on chunks of the vocabulary, and what stands between them.

On the emulator a chunk has 96 KiB of logits and gradients, and 256 entries at least.
"""

import pytest
import torch

import pykern
from pykern.reference import policy_logprobs as reference
from tests.policy.loss_cases import arguments as loss_arguments
from tests.policy.test_linear_policy_loss import exact as exact_loss
from tests.policy.test_linear_policy_loss import make as loss_case
from tests.policy.test_linear_policy_loss import run as run_loss
from tests.policy.test_linear_policy_loss import workspace
from tests.policy.test_linear_token_logprobs import DTYPES, check_against_torch, make, run
from tests.support import DEVICES, assert_accurate, on, poison

pytestmark = pytest.mark.parametrize("device", [name for name in DEVICES if name != "cpu"], indirect=True)

EVERYTHING = {"temperature": 0.8, "softcap": 2.0, "entropy": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, hidden_size, vocabulary",
    [(1, 1, 1), (1, 3, 17000), (2, 37, 9001), (7, 20, 2049), (64, 16, 256), (65, 8, 257), (50, 9, 527)],
)
def test_chunks(everywhere, dtype, rows, hidden_size, vocabulary):
    hidden, weight, targets, bias = make(rows, hidden_size, vocabulary, dtype, bias=True)
    targets[3::7] = -100
    check_against_torch(hidden, weight, targets, bias, **EVERYTHING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, hidden_size", [(50, 257), (49, 511)])
def test_hidden_states_wider_than_a_chunk(everywhere, dtype, rows, hidden_size):
    """Their gradient is then accumulated a few rows at a time, at whatever place these begin."""
    hidden, weight, targets, _ = make(rows, hidden_size, 400, dtype)
    check_against_torch(hidden, weight, targets)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_shards_of_the_vocabulary(everywhere, dtype, request):
    """What the op gives for a shard, against the CPU; the second one has nothing that can be drawn."""
    hidden, weight, targets, _ = make(33, 24, 900, dtype)
    targets[:4] = torch.tensor([0, 299, 300, 899])
    targets[7] = -100
    bias = torch.randn(900, dtype=torch.float64)
    bias[300:600] = -torch.inf
    temperature = torch.rand(33, dtype=torch.float64) + 0.5
    grads = [torch.randn(33).to(torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(2)]
    _, entropy, statistics = torch.ops.pykern.linear_token_logprobs.default(
        hidden, weight, targets, bias, temperature, 1.0, 0.0, True, 0
    )
    found = {}
    for device in ("cpu", request.node.callspec.params["device"]):
        with on(device) as place:
            found[device] = []
            for shard in (slice(0, 300), slice(300, 600), slice(600, 900), slice(900, 900)):
                given = [hidden, weight[shard], targets, bias[shard], temperature]
                given = [tensor.to(place) for tensor in given]
                found[device] += torch.ops.pykern.linear_token_logprobs.default(*given, 1.0, 0.0, True, shard.start)
                rest = [tensor.to(place) for tensor in (statistics, entropy, *grads)]
                found[device] += torch.ops.pykern.linear_token_logprobs_backward.default(
                    *given, 1.0, 0.0, *rest, shard.start, True, True, True
                )
    small = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 1e-4}
    for got, want in zip(found.pop(request.node.callspec.params["device"]), found.pop("cpu")):
        torch.testing.assert_close(got.cpu(), want, equal_nan=True, **small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_again(everywhere, dtype):
    hidden, weight, targets, bias = make(66, 24, 600, dtype, bias=True)
    given = (hidden, weight, targets, bias, [torch.randn(66) for _ in range(2)])
    first, again = (run(pykern.linear_token_logprobs, *given, **EVERYTHING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], again[0] + again[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_some_gradients_in_several_chunks(everywhere, dtype, wanted):
    hidden, weight, targets, bias = make(66, 24, 600, dtype, bias=True)
    _, grads = run(pykern.linear_token_logprobs, hidden, weight, targets, bias, [torch.ones(66)])
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((hidden, weight, bias))]
    pykern.linear_token_logprobs(leaves[0], leaves[1], targets, bias=leaves[2]).sum().backward()
    for i, leaf in enumerate(leaves):
        assert leaf.grad is None if i not in wanted else torch.equal(leaf.grad, grads[i])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rows_left_out_hold_anything(everywhere, dtype):
    """Ignored rows, and those whose gradient is exactly 0, in several chunks and with a bias."""
    hidden, weight, targets, bias = make(66, 24, 600, dtype, bias=True)
    targets[::3] = -100
    weights = torch.randn(66)
    weights[1::3] = 0
    left_out = torch.zeros(66, dtype=torch.bool)
    left_out[::3] = left_out[1::3] = True
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logprobs = pykern.linear_token_logprobs(leaves[0], leaves[1], targets, bias=leaves[2])
    leaves[0].data[left_out] = torch.inf
    poison(leaves[0].data[::3])
    logprobs.backward(weights.to(logprobs.dtype))
    _, grads = run(pykern.linear_token_logprobs, hidden, weight, targets, bias, [weights])
    assert not leaves[0].grad[left_out].any()
    for leaf, grad in zip(leaves, grads):
        assert leaf.grad.isfinite().all() and torch.equal(leaf.grad, grad)


def test_logits_are_not_rounded(everywhere):
    """Of sixteen-bit factors the product stays float32: log-probabilities err by less than a rounding of a logit."""
    hidden, weight, targets, _ = make(30, 64, 600, torch.bfloat16, spread=8.0)
    exact = reference.linear_token_logprobs(hidden.double(), weight.double(), targets)
    assert_accurate(pykern.linear_token_logprobs(hidden, weight, targets), exact, units=4)


def test_a_leaf_given_to_the_op_itself(everywhere):
    """Grad mode is on, and the products inside must not mind."""
    hidden, weight, targets, _ = make(5, 8, 600)
    arguments = (targets, None, None, 1.0, 0.0, False, 0)
    want = torch.ops.pykern.linear_token_logprobs.default(hidden, weight, *arguments)
    got = torch.ops.pykern.linear_token_logprobs.default(hidden.requires_grad_(), weight.requires_grad_(), *arguments)
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size, keywords", [(24, {}), (64, EVERYTHING), (101, EVERYTHING)])
def test_kept_logits(everywhere, dtype, hidden_size, keywords):
    """Rows whose logits stay from the forward to the backward, in two steps that add to the same sums."""
    hidden, weight, targets, bias = make(70, hidden_size, 401, dtype, bias=bool(keywords))
    targets[::7] = -100
    poison(hidden[::7])
    weights = [torch.randn(70) for _ in range(2)]
    weights[0][1::7] = weights[1][1::7] = 0
    exact, exact_grads = run(
        reference.linear_token_logprobs, hidden, weight, targets, bias, weights, torch.float64, **keywords
    )
    eager, eager_grads = run(reference.linear_token_logprobs, hidden, weight, targets, bias, weights, **keywords)

    settings = (keywords.get("temperature", 1.0), keywords.get("softcap", 0.0))
    entropy = "entropy" in keywords
    double_bias = None if bias is None else bias.double()
    weight_sums = torch.zeros(401, -(-hidden_size // 64) * 64)
    bias_sums = torch.zeros(401, dtype=torch.float64)
    logits = torch.empty(64 * 576)
    results, grad_hidden = [], []
    for rows in (slice(0, 64), slice(64, 70)):
        given = (hidden[rows], weight, targets[rows], double_bias, None, *settings)
        found = torch.ops.pykern.linear_chunk_logprobs.default(*given, entropy, logits)
        results.append(found[:2])
        grad_hidden.append(
            torch.ops.pykern.linear_chunk_gradients.default(
                *given,
                found[2],
                found[1],
                weights[0][rows],
                weights[1][rows] if entropy else None,
                logits,
                weight_sums,
                None if bias is None else bias_sums,
                True,
            )
        )
    for parts, want, other in zip(zip(*results), exact, eager):
        assert_accurate(torch.cat(parts), want, other, units=4)
    grads = [torch.cat(grad_hidden), weight_sums[:, :hidden_size], *([] if bias is None else [bias_sums.to(dtype)])]
    for grad, want, other in zip(grads, exact_grads, eager_grads):
        assert_accurate(grad, want, other, units=2)
    assert not grads[0][::7].any() and not grads[0][1::7].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_policy_loss_with_kept_logits(everywhere, dtype):
    """Whole, in two chunks of rows, against the definition and against log-probabilities and loss by themselves."""
    head, tensors = loss_case(6, 60, 24, 401, dtype, bias=True)
    positional, named = loss_arguments(tensors, entropy_coef=0.1)
    keywords = {"temperature": 0.8, "softcap": 3.0}
    room = workspace(head["weight"], 256)
    want, want_grads = exact_loss(head, positional, named, **keywords)
    for bytes_of_workspace, kept in ((room, True), (0, False)):
        loss, _, grads, once = run_loss(head, positional, named, workspace_bytes=bytes_of_workspace, **keywords)
        assert once == kept
        assert_accurate(loss, want, units=64)
        for grad, wanted in zip(grads, want_grads):
            assert_accurate(grad, wanted, units=4 if dtype == torch.bfloat16 else 32)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_kept_logits_for_one_gradient(everywhere, wanted):
    hidden, weight, targets, bias = make(10, 8, 50, bias=True)
    given = (hidden, weight, targets, bias.double(), None, 1.0, 0.0)
    found = {}
    for all_of_them in (True, False):
        logits = torch.empty(64 * 192)
        _, entropies, statistics = torch.ops.pykern.linear_chunk_logprobs.default(*given, False, logits)
        sums = {"weight": torch.zeros(50, 64), "bias": torch.zeros(50, dtype=torch.float64)}
        asked = [total if all_of_them or wanted == name else None for name, total in sums.items()]
        sums["hidden"] = torch.ops.pykern.linear_chunk_gradients.default(
            *given, statistics, entropies, torch.ones(10), None, logits, *asked, all_of_them or wanted == "hidden"
        )
        found[all_of_them] = sums
    assert found[True][wanted].any() and torch.equal(found[True][wanted], found[False][wanted])
    assert not any(total.any() for name, total in found[False].items() if name != wanted)


def test_kept_logits_of_nothing(everywhere):
    for rows, hidden_size, vocabulary in ((0, 8, 50), (3, 8, 0), (3, 0, 50)):
        hidden, weight = torch.randn(rows, hidden_size), torch.randn(vocabulary, hidden_size)
        given = (hidden, weight, torch.full((rows,), -100), None, None, 1.0, 0.0)
        logits, sums = torch.empty(64 * 192), torch.zeros(vocabulary, 64)
        logprobs, entropies, statistics = torch.ops.pykern.linear_chunk_logprobs.default(*given, False, logits)
        grad = torch.ops.pykern.linear_chunk_gradients.default(
            *given, statistics, entropies, torch.ones(rows), None, logits, sums, None, True
        )
        assert logprobs.shape == (rows,) and not logprobs.any()
        assert grad.shape == hidden.shape and not grad.any() and not sums.any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.empty(64 * 192 - 1)}, "logits: expected at least 12288 elements, got 12287"),
        ({"hidden": torch.zeros(2, 4).half(), "weight": torch.zeros(5, 4).half()}, "expected float32 or bfloat16"),
        ({"weight_sums": torch.zeros(4, 64)}, "weight_sums: expected size 5 in dimension 0, got 4"),
        ({"bias_sums": torch.zeros(5)}, "bias_sums: expected [a-z0-9]+, got [a-z0-9]+"),
    ],
    ids=["logits", "float16", "weight_sums", "bias_sums"],
)
def test_kept_logits_refuse(everywhere, change, message):
    given = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "logits": torch.empty(64 * 192)}
    given |= {"weight_sums": torch.zeros(5, 64), "bias_sums": torch.zeros(5, dtype=torch.float64)}
    device = torch.zeros(0).device
    given = {name: tensor.to(device) for name, tensor in (given | change).items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pykern.linear_chunk_gradients.default(
            given["hidden"], given["weight"], torch.tensor([0, 1]), None, None, 1.0, 0.0, torch.zeros(2, 2),
            torch.zeros(0), torch.ones(2), None, given["logits"], given["weight_sums"], given["bias_sums"], True,
        )  # fmt: skip
