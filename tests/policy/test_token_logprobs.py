"""token_logprobs: values, gradients, edges, refusals."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pykern
from pykern.reference import policy_logprobs as reference
from tests.support import DEVICES, assert_accurate, assert_grads, check_op, compile_whole, poison, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"entropy": True, "sum_p2": True}

CPU_ONLY = pytest.mark.parametrize("device", ["cpu"], indirect=True)
CUDA_ONLY = pytest.mark.parametrize("device", [name for name in DEVICES if name != "cpu"], indirect=True)

pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def place(device):
    """Runs the test on each device, which is also where its tensors are made."""
    with nullcontext() if device.type == "cpu" else device:
        yield


def exact_and_eager(logits, targets, weights, **keywords):
    """Results and gradient of logits: in float64, and by PyTorch's own float32 computation on the same logits."""
    found = []
    for to_compute in (torch.float64, torch.float32):
        leaf = logits.detach().clone().requires_grad_()
        results = reference.token_logprobs(leaf.to(to_compute), targets, **keywords)
        sum((w.to(r.dtype) * r).sum() for w, r in zip(weights, results)).backward()
        if to_compute is torch.float64:
            # The gradient before it is rounded to the dtype of the logits.
            wide = logits.detach().double().requires_grad_()
            exact = reference.token_logprobs(wide, targets, **keywords)
            sum((w.double() * r).sum() for w, r in zip(weights, exact)).backward()
            found.append((results, wide.grad))
        else:
            found.append((results, leaf.grad))
    return found


def check_against_torch(logits, targets, **keywords):
    keywords = {**EVERYTHING, **keywords}
    weights = [torch.randn(targets.shape) for _ in range(3)]
    (exact, exact_grad), (eager, eager_grad) = exact_and_eager(logits, targets, weights, **keywords)
    leaf = logits.detach().requires_grad_()
    results = pykern.token_logprobs(leaf, targets, **keywords)
    sum((w * r).sum() for w, r in zip(weights, results)).backward()
    for result, want, other in zip(results, exact, eager):
        assert result.dtype == torch.float32
        assert_accurate(result, want, other, units=4)
    assert leaf.grad.dtype == logits.dtype
    assert_accurate(leaf.grad, exact_grad, eager_grad, units=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 257, 1024, 3001])
def test_matches_float64(dtype, vocabulary):
    logits = (3 * torch.randn(5, vocabulary)).to(dtype)
    check_against_torch(logits, torch.randint(vocabulary, (5,)))


@CPU_ONLY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64_at_every_level(cpu_level, dtype):
    logits = (3 * torch.randn(3, 4, 1100)).to(dtype)
    check_against_torch(logits, torch.randint(1100, (3, 4)), temperature=0.7)


@pytest.mark.parametrize("temperature", [0.01, 0.6, 1.0, 7.0])
def test_temperature(temperature):
    check_against_torch(torch.randn(6, 129), torch.randint(129, (6,)), temperature=temperature)


def test_temperature_per_token():
    temperature = torch.tensor([0.5, 1.0, 2.0, 0.1])
    check_against_torch(torch.randn(3, 4, 65), torch.randint(65, (3, 4)), temperature=temperature)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_and_tiny_logits(scale, offset):
    check_against_torch(scale * torch.randn(4, 300) + offset, torch.randint(300, (4,)))


@pytest.mark.parametrize("direction", [1, -1])
def test_sorted_logits_move_the_maximum(direction):
    logits = torch.linspace(-50 * direction, 50 * direction, 5000).repeat(2, 1)
    check_against_torch(logits, torch.tensor([0, 4999]))


def test_ties():
    logprobs, entropy, sum_p2 = pykern.token_logprobs(torch.full((2, 1000), 7.0), torch.tensor([0, 999]), **EVERYTHING)
    want = torch.tensor(1000.0).log().expand(2)
    torch.testing.assert_close(logprobs, -want, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum_p2, torch.full((2,), 1e-3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_masked_vocabulary_entries(dtype):
    logits = torch.randn(4, 2100).to(dtype)
    logits[:, ::3] = -torch.inf
    logits[1, :1100] = -torch.inf
    targets = torch.tensor([1, 2099, 4, 5])
    kept = logits[0].isfinite()
    leaf = logits.requires_grad_()
    results = pykern.token_logprobs(leaf, targets, **EVERYTHING)
    sum(r.sum() for r in results).backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[0][~kept].any()
    alone = logits.detach()[:1, kept].requires_grad_()
    position = int(kept[: targets[0]].sum())
    few = pykern.token_logprobs(alone, torch.tensor([position]), **EVERYTHING)
    sum(r.sum() for r in few).backward()
    for r, want in zip(results, few):
        torch.testing.assert_close(r[:1], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad[:1, kept], alone.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_entries_masked_by_the_lowest_number(dtype):
    logits = torch.randn(2, 2100).to(dtype)
    logits[0, :2000] = torch.finfo(dtype).min
    logits[1] = torch.finfo(dtype).min
    targets = torch.tensor([2050, 7])
    results = pykern.token_logprobs(logits, targets, **EVERYTHING)
    for r, want in zip(results, reference.token_logprobs(logits.double(), targets, **EVERYTHING)):
        torch.testing.assert_close(r, want.to(r.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_row_without_an_entry_is_not_a_number(dtype):
    logits = torch.randn(2, 90).to(dtype)
    logits[1] = -torch.inf
    results = pykern.token_logprobs(leaf := logits.requires_grad_(), torch.tensor([3, 3]), **EVERYTHING)
    sum(r.sum() for r in results).backward()
    assert all(r[0].isfinite() and r[1].isnan() for r in results)
    assert leaf.grad[0].isfinite().all() and leaf.grad[1].isnan().all()


def test_masked_target_has_probability_zero():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert pykern.token_logprobs(logits, torch.tensor([1])).item() == -torch.inf


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1500, 1599])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_not_a_number_shows(bad, where, dtype):
    logits = torch.randn(2, 1600).to(dtype)
    logits[0, where] = bad
    results = pykern.token_logprobs(logits, torch.tensor([3, 3]), **EVERYTHING)
    assert all(r[0].isnan() and r[1].isfinite() for r in results)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_ignored_rows_are_not_read(dtype):
    logits = torch.randn(6, 300).to(dtype)
    targets = torch.randint(300, (6,))
    targets[[0, 3]] = torch.tensor([-100, -1])
    poison(logits[0]), poison(logits[3])
    leaf = logits.requires_grad_()
    results = pykern.token_logprobs(leaf, targets, **EVERYTHING)
    assert all(r[0] == 0 and r[3] == 0 and r.isfinite().all() for r in results)
    sum(r.sum() for r in results).backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[[0, 3]].any() and leaf.grad[1].any()


def test_rows_of_zero_gradient_are_not_read_back():
    logits = torch.randn(3, 70, requires_grad=True)
    logprobs = pykern.token_logprobs(logits, torch.tensor([1, 2, 3]))
    poison(logits.data[1])
    logprobs.backward(torch.tensor([1.0, 0.0, 2.0]))
    assert logits.grad.isfinite().all() and not logits.grad[1].any()


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base[:, :-1],
        lambda base: base[::2],
        lambda base: base.transpose(0, 1),
        lambda base: base[..., 3:],
        lambda base: base.transpose(1, 2),
        lambda base: base[:1].expand(4, -1, -1),
        lambda base: base[..., ::2],
    ],
    ids=["shifted", "strided", "transposed", "offset", "columns", "expanded", "stepped"],
)
def test_views(view, request):
    # A CUDA kernel splits a row by its alignment.
    same_bits = request.node.callspec.params["device"] == "cpu"
    base = torch.randn(4, 9, 70)
    logits = view(base)
    targets = torch.randint(logits.shape[-1], logits.shape[:-1])
    grads = []
    for make in (lambda x: x, torch.Tensor.contiguous):
        leaf = base.clone().requires_grad_()
        results = pykern.token_logprobs(make(view(leaf)), targets, **EVERYTHING)
        sum(r.sum() for r in results).backward()
        grads.append((leaf.grad, *results))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if same_bits else {}))


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (7,), (2, 1, 2, 7)])
def test_shapes(shape):
    logits = torch.randn(shape, requires_grad=True)
    targets = torch.zeros(shape[:-1], dtype=torch.int64)
    results = pykern.token_logprobs(logits, targets, **EVERYTHING)
    assert all(r.shape == targets.shape for r in results)
    sum(r.sum() for r in results).backward()
    assert logits.grad.shape == shape


def test_results_asked_for():
    logits, targets = torch.randn(3, 5), torch.tensor([0, 1, 2])
    everything = pykern.token_logprobs(logits, targets, **EVERYTHING)
    assert torch.equal(pykern.token_logprobs(logits, targets), everything[0])
    for name, index in (("entropy", 1), ("sum_p2", 2)):
        pair = pykern.token_logprobs(logits, targets, **{name: True})
        assert len(pair) == 2 and torch.equal(pair[0], everything[0]) and torch.equal(pair[1], everything[index])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_result_alone_has_its_gradient(which):
    logits, targets = torch.randn(4, 33), torch.randint(33, (4,))
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    pykern.token_logprobs(leaf, targets, **EVERYTHING)[which].sum().backward()
    reference.token_logprobs(exact, targets, **EVERYTHING)[which].sum().backward()
    assert_accurate(leaf.grad, exact.grad, units=4)


@pytest.mark.parametrize(
    "temperature", [1.3, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)], ids=["number", "tensor"]
)
def test_gradcheck(temperature):
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([4, -100, 10])
    assert torch.autograd.gradcheck(
        lambda x: pykern.token_logprobs(x, targets, temperature=temperature, **EVERYTHING), (logits,)
    )


def test_float64_matches_reference():
    logits, targets = torch.randn(5, 77, dtype=torch.float64), torch.randint(77, (5,))
    results = pykern.token_logprobs(logits, targets, **EVERYTHING)
    for r, want in zip(results, reference.token_logprobs(logits, targets, **EVERYTHING)):
        assert r.dtype == torch.float64
        torch.testing.assert_close(r, want, rtol=1e-13, atol=1e-13)


@CPU_ONLY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    logits, targets = torch.randn(17, 9000).to(dtype), torch.randint(9000, (17,))

    def run():
        leaf = logits.clone().requires_grad_()
        results = pykern.token_logprobs(leaf, targets, **EVERYTHING)
        sum(r.sum() for r in results).backward()
        return (*results, leaf.grad)

    runs = [run()]
    for count in (1, 2, 3):
        with threads(count):
            runs.append(run())
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


def test_row_does_not_depend_on_its_neighbours():
    logits, targets = torch.randn(9, 1500), torch.randint(1500, (9,))
    together = pykern.token_logprobs(logits, targets)
    assert all(torch.equal(pykern.token_logprobs(logits[i], targets[i]), together[i]) for i in range(9))


@pytest.mark.parametrize("temperature", [0.9, torch.rand(2, 3) + 0.5], ids=["number", "tensor"])
def test_compiles_whole(temperature):
    def function(logits, targets):
        logprobs, entropy = pykern.token_logprobs(logits, targets, temperature=temperature, entropy=True)
        return (logprobs + 0.1 * entropy).sum()

    targets = torch.randint(20, (2, 3))
    grads = []
    for run in (function, compile_whole(function)):
        leaf = torch.linspace(-2, 2, 120).view(2, 3, 20).clone().requires_grad_()
        loss = run(leaf, targets)
        loss.backward()
        assert_grads({"logits": leaf})
        grads.append((loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("everything", [True, False])
def test_opcheck(dtype, everything):
    logits, targets = torch.randn(2, 3, 20).to(dtype), torch.randint(20, (2, 3))
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5
    arguments = (logits, targets, temperature, 1.0)
    check_op(torch.ops.pykern.token_logprobs.default, (*arguments, everything, everything))
    _, entropy, sum_p2, statistics = torch.ops.pykern.token_logprobs.default(*arguments, everything, everything)
    grad = torch.randn(2, 3).to(statistics.dtype)
    check_op(
        torch.ops.pykern.token_logprobs_backward.default,
        (*arguments, statistics, entropy, sum_p2, grad, grad if everything else None, grad if everything else None),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beyond", [-1, 0, 1, 8])
def test_sizes_around_a_turn_of_a_block(dtype, beyond):
    # 384 threads with four packs of sixteen bytes each.
    vocabulary = 384 * 4 * 16 // dtype.itemsize + beyond
    check_against_torch((3 * torch.randn(2, vocabulary)).to(dtype), torch.tensor([vocabulary - 1, 0]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary", [3, 8, 40, 77])
def test_every_target_of_every_alignment(dtype, vocabulary):
    logits = torch.randn(vocabulary, vocabulary + 1).to(dtype)[:, :-1].requires_grad_()
    logprobs = pykern.token_logprobs(logits, torch.arange(vocabulary))
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    want = reference.token_logprobs(exact, torch.arange(vocabulary))
    (exact_grad,) = torch.autograd.grad(want.sum(), exact)
    assert_accurate(logprobs, want, units=8)
    assert_accurate(grad, exact_grad, units=4)


def test_many_leading_dimensions():
    base = torch.randn(2, 3, 2, 2, 3, 2, 2, 9)
    logits = base[:, ::2, :, :, ::2].transpose(0, 3).transpose(2, 5)
    targets = torch.randint(9, logits.shape[:-1])
    assert torch.equal(pykern.token_logprobs(logits, targets), pykern.token_logprobs(logits.contiguous(), targets))


@CUDA_ONLY
@pytest.mark.parametrize("past", [5, 6, 2**62])
def test_target_past_the_vocabulary_is_not_a_number(past, monkeypatch):
    # The kernels' own answer: on CUDA, Python does not look at the targets.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    logits = torch.randn(3, 5, requires_grad=True)
    logprobs = pykern.token_logprobs(logits, torch.tensor([1, past, 2]))
    logprobs.sum().backward()
    assert logprobs.isnan().tolist() == [False, True, False]
    assert logits.grad.isnan().any(1).tolist() == [False, True, False]


# --- backward in place ----------------------------------------------------------------------------


def grads_both_ways(logits, targets, view=lambda x: x, **keywords):
    """The gradient of `logits` by an ordinary backward and by one in place, where a copy of them stands in for
    what a model computes; and that copy."""
    found = []
    for in_place in (False, True):
        leaf = logits.detach().clone().requires_grad_()
        computed = leaf.clone()
        results = pykern.token_logprobs(view(computed), targets, **EVERYTHING, **keywords, backward_in_place=in_place)
        sum((i + 1) * r.sum() for i, r in enumerate(results)).backward()
        found.append(leaf.grad)
    return (*found, computed.detach())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 9, 64, 515, 2051])
def test_in_place_is_the_same_gradient(dtype, vocabulary):
    logits, targets = (3 * torch.randn(2, 3, vocabulary)).to(dtype), torch.randint(vocabulary, (2, 3))
    targets[0, 1] = -100
    temperature = torch.rand(2, 3) + 0.5
    usual, in_place, overwritten = grads_both_ways(logits, targets, temperature=temperature)
    assert torch.equal(usual, in_place) and torch.equal(in_place, overwritten)
    assert not in_place[0, 1].any()


def test_in_place_of_a_view_leaves_the_rest():
    logits, targets = torch.randn(2, 4, 37), torch.randint(37, (2, 3))
    usual, in_place, overwritten = grads_both_ways(logits, targets, lambda x: x[:, :-1])
    torch.testing.assert_close(usual, in_place, rtol=1e-6, atol=1e-7)
    assert torch.equal(overwritten[:, :-1], in_place[:, :-1])
    assert torch.equal(overwritten[:, -1], logits[:, -1]) and not in_place[:, -1].any()


def test_in_place_gradient_is_the_memory_of_the_logits():
    logits, targets = torch.randn(3, 40, requires_grad=True), torch.tensor([0, 39, 7])
    computed = logits * 1
    logprobs = pykern.token_logprobs(computed, targets, backward_in_place=True)
    (grad,) = torch.autograd.grad(logprobs.sum(), computed)
    assert grad.data_ptr() == computed.data_ptr() and not grad.requires_grad
    assert_accurate(grad, torch.nn.functional.one_hot(targets, 40) - torch.softmax(logits.double(), -1), units=4)


def test_in_place_accumulates_with_other_gradients():
    logits, targets = torch.randn(3, 40), torch.tensor([0, 39, 7])
    grads = []
    for in_place in (False, True):
        leaf = logits.clone().requires_grad_()
        computed = leaf * 1
        (pykern.token_logprobs(computed, targets, backward_in_place=in_place).sum() + 3 * computed.sum()).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_in_place_rows_of_zero_gradient_are_zero():
    logits = torch.randn(3, 70, requires_grad=True)
    logprobs = pykern.token_logprobs(logits * 1, torch.tensor([1, 2, 3]), backward_in_place=True)
    logprobs.backward(torch.tensor([1.0, 0.0, 2.0]))
    assert not logits.grad[1].any() and logits.grad[0].any()


def test_in_place_refuses_a_second_backward():
    computed = torch.randn(2, 9, requires_grad=True) * 1
    loss = pykern.token_logprobs(computed, torch.tensor([1, 2]), backward_in_place=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward has overwritten the logits .*backward_in_place=False"):
        loss.backward()


@pytest.mark.parametrize("other", [torch.exp, lambda x: pykern.token_logprobs(x, torch.tensor([1, 2]))])
def test_in_place_shows_to_others_that_saved_the_logits(other):
    computed = torch.randn(2, 9, requires_grad=True) * 1
    saved = computed * computed if other is torch.exp else other(computed)
    loss = pykern.token_logprobs(computed, torch.tensor([1, 2]), backward_in_place=True)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_in_place_without_gradient_keeps_the_logits():
    logits, targets = torch.randn(2, 9), torch.tensor([1, 2])
    before = logits.clone()
    logprobs = pykern.token_logprobs(logits, targets, backward_in_place=True)
    assert torch.equal(logits, before) and torch.equal(logprobs, pykern.token_logprobs(logits, targets))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.randn(1, 9).expand(2, 9), "rows that share no memory"),
        (lambda: torch.randn(12).as_strided((2, 9), (3, 1)), "rows that share no memory"),
        (lambda: torch.randn(9, 2).t(), "contiguous rows"),
    ],
    ids=["expanded", "overlapping", "columns"],
)
def test_in_place_refuses(make, message):
    logits, targets = make(), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=f"logits: expected {message} with backward_in_place=True.*contiguous"):
        pykern.token_logprobs(logits, targets, backward_in_place=True)
    _, entropy, sum_p2, statistics = torch.ops.pykern.token_logprobs.default(
        logits.contiguous(), targets, None, 1.0, False, False
    )
    arguments = (targets, None, 1.0, statistics, entropy, sum_p2, torch.ones(2), None, None)
    with pytest.raises(RuntimeError, match="logits: expected"):
        torch.ops.pykern.token_logprobs_backward_in_place.default(logits, *arguments)


def test_in_place_compiles_whole():
    targets = torch.tensor([1, 2])

    def function(leaf):
        return pykern.token_logprobs(leaf * 1, targets, backward_in_place=True).sum()

    grads = []
    for run in (function, compile_whole(function)):
        leaf = torch.linspace(-2, 2, 40).view(2, 20).clone().requires_grad_()
        run(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_opcheck_in_place():
    logits, targets = torch.randn(2, 3, 20), torch.randint(20, (2, 3))
    arguments = (targets, None, 0.8)
    _, entropy, sum_p2, statistics = torch.ops.pykern.token_logprobs.default(logits, *arguments, True, True)
    grad = torch.randn(2, 3)
    check_op(
        torch.ops.pykern.token_logprobs_backward_in_place.default,
        (logits, *arguments, statistics, entropy, sum_p2, grad, None, grad),
    )


def test_int32_targets():
    logits, targets = torch.randn(4, 9), torch.tensor([0, 8, -100, 3])
    assert torch.equal(pykern.token_logprobs(logits, targets.int()), pykern.token_logprobs(logits, targets))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "logits: expected a tensor of float32"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits: expected shape \[..., V\]"),
        ({"targets": torch.zeros(2)}, TypeError, "targets: expected a tensor of int64 or int32"),
        ({"targets": [1, 2]}, TypeError, "targets: expected a tensor of int64 or int32, got list"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets: expected shape \[2\]"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive finite number"),
        ({"temperature": "hot"}, ValueError, "temperature: expected a positive finite number"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature: expected a shape that broadcasts"),
        ({"temperature": torch.tensor([1.0, 0.0])}, ValueError, "temperature: expected positive finite .* got 0.0"),
        ({"temperature": torch.tensor(float("nan"))}, ValueError, "temperature: expected positive finite .* got nan"),
        ({"temperature": torch.ones(2, dtype=torch.int64)}, TypeError, "temperature: expected a floating-point tensor"),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, "temperature: expected no requires_grad"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"logits": torch.zeros(2, 5), "targets": torch.tensor([0, 1]), "temperature": 1.0, **change}
    with pytest.raises(error, match=message) as raised:
        pykern.token_logprobs(arguments["logits"], arguments["targets"], temperature=arguments["temperature"])
    assert "\n" not in str(raised.value)


@CPU_ONLY
def test_refuses_targets_past_the_vocabulary():
    with pytest.raises(ValueError, match="targets: expected values below the vocabulary size 5, got 5"):
        pykern.token_logprobs(torch.zeros(2, 5), torch.tensor([0, 5]))


@CPU_ONLY
def test_op_itself_refuses_targets_past_the_vocabulary():
    with pytest.raises(RuntimeError, match="targets: expected values below 5, got 7"):
        torch.ops.pykern.token_logprobs.default(torch.zeros(1, 5), torch.tensor([7]), None, 1.0, False, False)


@CPU_ONLY
def test_cuda_tensors_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(pykern._native, "cuda_unavailable_reason", "this build of pykern has no CUDA kernels")
    with FakeTensorMode():
        logits, targets = torch.empty(2, 5, device="cuda"), torch.empty(2, dtype=torch.int64, device="cuda")
        with pytest.raises(NotImplementedError, match="no CUDA kernels; move the tensors to the CPU"):
            pykern.token_logprobs(logits, targets)
