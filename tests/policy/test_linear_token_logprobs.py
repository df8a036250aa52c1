"""linear_token_logprobs: values, gradients, edges, refusals."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pykern
from pykern.reference import policy_logprobs as reference
from tests.support import assert_accurate, assert_grads, check_op, compile_whole, poison, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows, hidden_size, vocabulary, dtype=torch.float32, bias=False, spread=1.0):
    hidden = torch.randn(rows, hidden_size).to(dtype)
    weight = (spread * torch.randn(vocabulary, hidden_size) / max(hidden_size, 1) ** 0.5).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (rows,)), torch.randn(vocabulary).to(dtype) if bias else None


def run(function, hidden, weight, targets, bias, weights, dtype=None, **keywords):
    """Results and the gradients of hidden, weight and bias."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight, bias)]
    results = function(leaves[0], leaves[1], targets, bias=leaves[2], **keywords)
    results = results if isinstance(results, tuple) else (results,)
    sum((w.to(r.dtype) * r).sum() for w, r in zip(weights, results)).backward()
    return [r.detach() for r in results], [leaf.grad for leaf in leaves if leaf is not None]


def check_against_torch(hidden, weight, targets, bias=None, **keywords):
    weights = [torch.randn(targets.shape) for _ in range(2)]
    given = (hidden, weight, targets, bias, weights)
    exact, exact_grads = run(reference.linear_token_logprobs, *given, dtype=torch.float64, **keywords)
    eager, eager_grads = run(reference.linear_token_logprobs, *given, **keywords)
    results, grads = run(pykern.linear_token_logprobs, *given, **keywords)
    for result, want, other in zip(results, exact, eager):
        assert result.dtype == torch.float32
        assert_accurate(result, want, other, units=4)
    for grad, want, other, leaf in zip(grads, exact_grads, eager_grads, (hidden, weight, bias)):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert_accurate(grad, want, other, units=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, hidden_size, vocabulary",
    [(1, 1, 1), (3, 5, 7), (65, 64, 192), (70, 33, 193), (200, 48, 401), (19, 300, 1000)],
)
def test_matches_float64(everywhere, dtype, rows, hidden_size, vocabulary):
    hidden, weight, targets, _ = make(rows, hidden_size, vocabulary, dtype)
    check_against_torch(hidden, weight, targets, entropy=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything(everywhere, dtype):
    hidden, weight, targets, bias = make(31, 39, 407, dtype, bias=True)
    targets[::7] = -100
    check_against_torch(hidden, weight, targets, bias, temperature=0.8, softcap=2.0, entropy=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_every_level(cpu_level, dtype):
    hidden, weight, targets, bias = make(150, 39, 407, dtype, bias=True)
    targets[::7] = -100
    check_against_torch(hidden, weight, targets, bias, temperature=0.8, softcap=2.0, entropy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_groups_and_slabs(dtype):
    hidden, weight, targets, bias = make(5600, 16, 1537 + 193, dtype, bias=True)
    check_against_torch(hidden, weight, targets, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_over_a_small_vocabulary(dtype):
    hidden, weight, targets, bias = make(1700, 20, 261, dtype, bias=True)
    targets[::5] = -100
    check_against_torch(hidden, weight, targets, bias, entropy=True)


@pytest.mark.parametrize("hidden_size", [700, 1100])
def test_wide_hidden_states(hidden_size):
    hidden, weight, targets, _ = make(130, hidden_size, 500)
    check_against_torch(hidden, weight, targets)


@pytest.mark.parametrize("softcap", [0.1, 5.0, 1000.0])
def test_softcap(everywhere, softcap):
    hidden, weight, targets, _ = make(40, 32, 300, spread=8.0)
    check_against_torch(hidden, weight, targets, softcap=softcap, entropy=True)


@pytest.mark.parametrize("temperature", [0.05, 3.0, torch.linspace(0.3, 3.0, 40)], ids=["cold", "hot", "per token"])
def test_temperature(everywhere, temperature):
    hidden, weight, targets, bias = make(40, 32, 300, bias=True)
    temperature = temperature if isinstance(temperature, float) else temperature.to(targets.device)
    check_against_torch(hidden, weight, targets, bias, temperature=temperature, entropy=True)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(everywhere, offset):
    hidden, weight, targets, _ = make(10, 16, 500, spread=100.0)
    check_against_torch(hidden, weight, targets, torch.full((500,), offset), entropy=True)


def test_ties(everywhere):
    logprobs, entropy = pykern.linear_token_logprobs(
        torch.zeros(3, 8), torch.randn(1000, 8), torch.tensor([0, 500, 999]), entropy=True
    )
    want = torch.tensor(1000.0).log().expand(3)
    torch.testing.assert_close(logprobs, -want, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_bias_masks_vocabulary_entries(everywhere, dtype):
    hidden, weight, _, bias = make(9, 12, 700, dtype, bias=True)
    bias[:450] = -torch.inf
    bias[460::2] = -torch.inf
    kept = bias.isfinite()
    targets = kept.nonzero()[torch.arange(9), 0]
    given = [torch.randn(9) for _ in range(2)]
    results, grads = run(pykern.linear_token_logprobs, hidden, weight, targets, bias, given, entropy=True)
    few = torch.tensor([int(kept[:t].sum()) for t in targets])
    wanted, wanted_grads = run(pykern.linear_token_logprobs, hidden, weight[kept], few, bias[kept], given, entropy=True)
    for r, want in zip(results, wanted):
        torch.testing.assert_close(r, want, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][~kept].any() and not grads[2][~kept].any()
    torch.testing.assert_close(grads[0], wanted_grads[0], rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(grads[1][kept], wanted_grads[1], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_ignored_rows_are_not_read(everywhere, dtype, request):
    same_bits = request.node.callspec.params["device"] == "cpu"
    hidden, weight, targets, _ = make(100, 24, 210, dtype)
    targets[::3] = -100
    poison(hidden[::3])
    weights = [torch.randn(100) for _ in range(2)]
    results, grads = run(pykern.linear_token_logprobs, hidden, weight, targets, None, weights, entropy=True)
    assert all(not r[::3].any() and r.isfinite().all() for r in results)
    assert not grads[0][::3].any() and grads[0][1].any() and all(g.isfinite().all() for g in grads)
    kept = targets >= 0
    given = (hidden[kept], weight, targets[kept], None, [w[kept] for w in weights])
    few, few_grads = run(pykern.linear_token_logprobs, *given, entropy=True)
    pairs = [(r[kept], want) for r, want in zip(results, few)]
    pairs += [(grads[0][kept], few_grads[0]), (grads[1], few_grads[1])]
    for got, want in pairs:
        # Elsewhere the library that multiplies may take other ways for other sizes.
        torch.testing.assert_close(got, want, **({"rtol": 0, "atol": 0} if same_bits else {"rtol": 2e-2, "atol": 1e-3}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_zero_gradient_are_left_out(everywhere, dtype):
    hidden, weight, targets, _ = make(6, 8, 50, dtype)
    leaf, head = hidden.requires_grad_(), weight.requires_grad_()
    logprobs = pykern.linear_token_logprobs(leaf, head, targets)
    poison(leaf.data[2])
    logprobs.backward(torch.tensor([1.0, -1.0, 0.0, 0.5, 2.0, 1.0], dtype=dtype))
    assert leaf.grad.isfinite().all() and not leaf.grad[2].any() and head.grad.isfinite().all()


def test_not_a_number_shows(everywhere):
    hidden, weight, targets, _ = make(70, 8, 50)
    hidden[1, 3] = torch.nan
    logprobs, entropy = pykern.linear_token_logprobs(hidden, weight, targets, entropy=True)
    assert logprobs[1].isnan() and entropy[1].isnan()
    assert logprobs.isnan().sum() == 1 and entropy.isnan().sum() == 1


def test_nothing_active(everywhere):
    hidden, weight, _, bias = make(5, 8, 50, bias=True)
    targets = torch.full((5,), -100)
    results, grads = run(pykern.linear_token_logprobs, hidden, weight, targets, bias, [torch.ones(5)])
    assert not results[0].any() and all(not g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows, hidden_size", [(0, 8), (4, 0), (0, 0)])
def test_empty(everywhere, dtype, rows, hidden_size):
    hidden, weight, targets, _ = make(rows, hidden_size, 13, dtype)
    results, grads = run(pykern.linear_token_logprobs, hidden, weight, targets, None, [torch.ones(rows)])
    torch.testing.assert_close(results[0], -torch.full((rows,), 13.0, dtype=dtype).log())
    assert [g.shape for g in grads] == [hidden.shape, weight.shape] and not grads[1].any()


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_gradient_alone(everywhere, wanted):
    hidden, weight, targets, bias = make(70, 20, 300, bias=True)
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    _, grads = run(pykern.linear_token_logprobs, hidden, weight, targets, bias, [torch.ones(70)])
    leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in given.items()}
    pykern.linear_token_logprobs(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"]).sum().backward()
    assert torch.equal(leaves[wanted].grad, grads[list(given).index(wanted)])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_entropy_alone_has_its_gradient(everywhere):
    hidden, weight, targets, _ = make(30, 20, 90)
    grads = []
    for function, dtype in ((pykern.linear_token_logprobs, None), (reference.linear_token_logprobs, torch.float64)):
        leaf = hidden.clone().to(dtype or hidden.dtype).requires_grad_()
        function(leaf, weight.to(leaf.dtype), targets, entropy=True)[1].sum().backward()
        grads.append(leaf.grad)
    assert_accurate(grads[0], grads[1], units=8)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"softcap": 1.5},
        {"temperature": 0.7, "softcap": 3.0},
        {"temperature": torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64)},
    ],
    ids=["plain", "softcap", "both", "temperature tensor"],
)
def test_gradcheck(everywhere, keywords):
    hidden, weight, _, bias = (None if t is None else t.double() for t in make(4, 3, 9, bias=True))
    targets = torch.tensor([0, 8, -100, 4])
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: pykern.linear_token_logprobs(h, w, targets, bias=b, entropy=True, **keywords), leaves
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views(dtype):
    base, weight, _, _ = make(60, 40, 300, dtype)
    targets = torch.randint(150, (30,))
    views = [
        (base[::2, 3:23], weight[::2, :20]),
        (base[:30, :40:2], weight[:150, ::2]),
        (base.t()[:30, :40], weight[:150].t().contiguous().t()),
    ]
    for hidden, head in views:
        rest = (targets, None, [torch.ones(30)])
        ours = run(pykern.linear_token_logprobs, hidden, head, *rest)
        same = run(pykern.linear_token_logprobs, hidden.contiguous(), head.contiguous(), *rest)
        assert all(torch.equal(a, b) for a, b in zip(ours[0] + ours[1], same[0] + same[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, vocabulary", [(5600, 1700), (1700, 261)])
def test_same_bits_for_any_number_of_threads(dtype, rows, vocabulary):
    hidden, weight, targets, bias = make(rows, 24, vocabulary, dtype, bias=True)
    targets[5] = -100
    given = (hidden, weight, targets, bias, [torch.randn(rows) for _ in range(2)])
    first = run(pykern.linear_token_logprobs, *given, entropy=True)
    for count in (1, 2, 3):
        with threads(count):
            again = run(pykern.linear_token_logprobs, *given, entropy=True)
        assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], again[0] + again[1]))


def test_agrees_with_token_logprobs(everywhere):
    hidden, weight, targets, _ = make(50, 16, 999)
    straight = pykern.linear_token_logprobs(hidden, weight, targets, entropy=True)
    through = pykern.token_logprobs(hidden @ weight.t(), targets, entropy=True)
    for a, b in zip(straight, through):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("keywords", [{}, {"softcap": 4.0, "temperature": 0.5}], ids=["plain", "softcap"])
def test_compiles_whole(keywords):
    hidden, weight, targets, bias = make(20, 12, 60, bias=True)

    def function(hidden, weight, bias):
        logprobs, entropy = pykern.linear_token_logprobs(hidden, weight, targets, bias=bias, entropy=True, **keywords)
        return (logprobs + 0.1 * entropy).sum()

    grads = []
    for call in (function, compile_whole(function)):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = call(*leaves)
        loss.backward()
        assert_grads(dict(zip(("hidden", "weight", "bias"), leaves)))
        grads.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("everything", [True, False])
def test_opcheck(everywhere, dtype, everything):
    hidden, weight, targets, _ = make(6, 10, 40, dtype)
    bias = torch.randn(40, dtype=torch.float64) if everything else None
    temperature = torch.rand(6, dtype=torch.float64) + 0.5 if everything else None
    arguments = (hidden, weight, targets, bias, temperature, 1.0, 3.0)
    check_op(torch.ops.pykern.linear_token_logprobs.default, (*arguments, everything, 11))
    _, entropy, statistics = torch.ops.pykern.linear_token_logprobs.default(*arguments, everything, 11)
    grad = torch.randn(6).to(statistics.dtype)
    check_op(
        torch.ops.pykern.linear_token_logprobs_backward.default,
        (*arguments, statistics, entropy, grad, grad if everything else None, 11, True, everything, everything),
    )


def test_int32_targets_and_other_bias_dtype(everywhere):
    hidden, weight, targets, bias = make(6, 10, 40, torch.bfloat16, bias=True)
    want = pykern.linear_token_logprobs(hidden, weight, targets, bias=bias)
    assert torch.equal(pykern.linear_token_logprobs(hidden, weight, targets.int(), bias=bias.float()), want)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": torch.zeros(2, 3, 4)}, ValueError, r"hidden: expected shape \[N, H\], got \[2, 3, 4\]"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "hidden: expected a tensor of float32"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight: expected shape \[V, 4\], got \[5, 3\]"),
        ({"weight": torch.zeros(5, 4).bfloat16()}, TypeError, "weight: expected the dtype of hidden, torch.float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets: expected shape \[2\]"),
        ({"targets": torch.tensor([0, 9])}, ValueError, "targets: expected values below the vocabulary size 5, got 9"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \[5\], got \[4\]"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, TypeError, "bias: expected a floating-point tensor or None"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a positive finite number"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive finite number or None, got 0.0"),
        ({"softcap": float("nan")}, ValueError, "softcap: expected a positive finite number or None"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match=message) as raised:
        pykern.linear_token_logprobs(**arguments)
    assert "\n" not in str(raised.value)


def test_cuda_tensors_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(pykern._native, "cuda_unavailable_reason", "this build of pykern has no CUDA kernels")
    with FakeTensorMode():
        hidden, weight = torch.empty(2, 4, device="cuda"), torch.empty(5, 4, device="cuda")
        with pytest.raises(NotImplementedError, match="no CUDA kernels; move the tensors to the CPU"):
            pykern.linear_token_logprobs(hidden, weight, torch.empty(2, dtype=torch.int64, device="cuda"))
