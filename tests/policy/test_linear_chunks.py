"""The CUDA side of linear_token_logprobs: products on chunks of the vocabulary, and what stands between them.

On the emulator a chunk has 96 KiB of logits and gradients, and 256 entries at least.
"""

import pytest
import torch

import pykern
from pykern.reference import policy_logprobs as reference
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
