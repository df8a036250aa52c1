"""prefix_attention: accuracy, packed against unpacked, what must not leak, repeatability."""

import pytest
import torch

import pykern
from pykern.reference import attention as reference
from tests.attention.checks import RESULTS, check, ours, plain, run
from tests.attention.trees import TREES, make_inputs, random_tree, with_padding
from tests.support import assert_accurate, assert_grads, poison, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def large_tree():
    return pykern.PrefixTree.from_groups([450, 70], [[90, 33, 141, 1, 64], [100, 0, 128]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TREES)
def test_accuracy(name, dtype):
    check(TREES[name](), 4, 2, 32, 32, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_on_every_instruction_set(cpu_level, dtype):
    check(random_tree(3, 16, 70), 6, 2, 72, 40, dtype)


@pytest.mark.parametrize("size", [0, 1, 3, 80, 96, 127, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_sizes(size, dtype):
    check(random_tree(7, 10, 40), 2, 1, size, max(size, 1), dtype)


@pytest.mark.parametrize(("size", "value_size"), [(64, 1), (24, 0), (192, 128), (5, 200)])
def test_value_size_of_its_own(size, value_size):
    check(random_tree(8, 10, 40), 2, 2, size, value_size, torch.float32)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (5, 5), (3, 1), (14, 2), (16, 1), (200, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_groups(heads, key_heads, dtype):
    check(random_tree(9, 10, 30), heads, key_heads, 16, 16, dtype)


@pytest.mark.parametrize("seed", range(16))
def test_random_trees(seed):
    tree = random_tree(100 + seed, nodes=1 + 3 * seed, longest=90)
    check(tree, 3, 1, 16, 24, (torch.float32, torch.bfloat16)[seed % 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_with_large_key_tiles(dtype):
    """Enough keys and heads that the backward's key tiles hold several units, on ragged boundaries."""
    check(large_tree(), 4, 4, 16, 16, dtype)


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0, 2.5])
def test_scale(scale):
    check(TREES["group"](), 2, 2, 16, 16, torch.float32, scale=scale)


def test_large_logits():
    check(TREES["groups"](), 2, 1, 32, 32, torch.float32, magnitude=100.0)


@pytest.mark.parametrize("key_heads", [2, 8])
def test_shared_prefix_gradients_are_summed_in_float32(key_heads):
    tree = pykern.PrefixTree.from_groups([128], [[24] * 12])
    check(tree, 8, key_heads, 64, 64, torch.bfloat16, factor=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_packed_equals_each_sequence_alone(seed, dtype):
    tree = random_tree(40 + seed, 14, 50)
    q, k, v, _ = make_inputs(tree, 4, 2, 24, 24, dtype)
    rows = tree.sequence_rows
    lengths = tree.cu_seqlens.diff().tolist()
    weights = [torch.randn(length, 4, 24, dtype=dtype) for length in lengths]

    packed = [x.clone().requires_grad_() for x in (q, k, v)]
    out = pykern.prefix_attention(*packed, tree)
    torch.autograd.backward(out[rows], torch.cat(weights))

    alone = [x.clone().requires_grad_() for x in (q, k, v)]
    for path, weight in zip(rows.split(lengths), weights, strict=True):
        own = pykern.PrefixTree.from_groups([len(path)], [[]])
        result = pykern.prefix_attention(*(x[path] for x in alone), own)
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(result, out[path], **tolerance)
        result.backward(weight)
    for got, want in zip(packed, alone, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4)


# --- what must not be read, or not reach further ---------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rows_that_see_nothing(dtype):
    tree = with_padding(pykern.PrefixTree.from_groups([20], [[5, 6]]), 100)
    q, k, v, grad_out = make_inputs(tree, 4, 2, 16, 16, dtype)
    grad_lse = torch.ones(131, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    clean = run(ours(tree), (q, k, v), (grad_out, grad_lse))
    for tensor in (q, k, v, grad_out):
        poison(tensor[31:])
    poison(grad_lse[31:])
    out, lse, *grads = run(ours(tree), (q, k, v), (grad_out, grad_lse))
    assert (out[31:] == 0).all()
    assert (lse[31:] == float("-inf")).all()
    for grad in grads:
        assert (grad[31:] == 0).all()
    for got, want in zip((out, lse, *grads), clean, strict=True):
        assert torch.equal(got[:31], want[:31])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_poison_stays_on_its_own_paths(which, dtype, value, cpu_level):
    """A token of one response holds NaN or infinity: nothing that doesn't share a path with it may tell."""
    check_poison(pykern.PrefixTree.from_groups([70], [[20, 30, 25]]), 2, 1, 100, which, dtype, value)


@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_stays_on_its_own_paths_in_large_key_tiles(which, dtype):
    check_poison(large_tree(), 4, 4, 580, which, dtype, float("nan"))


def check_poison(tree, heads, key_heads, token, which, dtype, value):
    inputs = dict(zip(("q", "k", "v", "grad_out"), make_inputs(tree, heads, key_heads, 16, 16, dtype), strict=True))

    def results():
        grads = (inputs["grad_out"], torch.zeros(tree.num_tokens, heads))
        return run(ours(tree), (inputs["q"], inputs["k"], inputs["v"]), grads)

    clean = results()
    inputs[which][token] = value
    dirty = results()
    visible = reference.visibility(tree.subtree_end)
    sees, seen = visible[:, token], visible[token]
    own = torch.arange(tree.num_tokens) == token
    # Rows of (out, lse, grad_q) that see the token or are it; rows of (grad_k, grad_v) that meet them.
    queries = {"q": own, "grad_out": own, "k": sees, "v": sees}[which]
    keys = seen if which in ("q", "grad_out") else (visible & sees[:, None]).any(dim=0)
    for index, (name, got, want) in enumerate(zip(RESULTS, dirty, clean, strict=True)):
        untouched = ~(queries if index < 3 else keys)
        torch.testing.assert_close(got[untouched], want[untouched], rtol=2e-2, atol=2e-2, msg=name)
        assert got[untouched].isfinite().all()
    reached = {"q": 0, "k": 0, "v": 0, "grad_out": 4}[which]
    assert not dirty[reached].isfinite().all()


def test_infinite_and_nan_logits_are_where_a_softmax_has_them():
    tree = TREES["group"]()
    q, k, v, grad_out = make_inputs(tree, 2, 2, 8, 8, torch.float32)
    # One row's logits are all -inf, one's all +inf, one's NaN.
    q[3], q[140], q[200] = float("inf"), float("inf"), float("nan")
    k.abs_()
    k[:4] *= -1
    out, lse = pykern.prefix_attention(q, k, v, tree, return_lse=True)
    want, *_ = reference.prefix_attention(q, k, v, tree.subtree_end)
    assert torch.equal(out.isnan(), want.isnan())
    assert out[3].isnan().all()


def test_any_thresholds_follow_the_rule():
    """A bare tuple may hold intervals that don't nest; the rule says what they mean."""
    generator = torch.Generator().manual_seed(1)
    begins = torch.arange(300)
    ends = (begins + torch.randint(0, 200, (300,), generator=generator)).clamp(max=300).to(torch.int32)
    q, k, v, grad_out = make_inputs(TREES["causal"](), 2, 1, 16, 16, torch.float32)
    q, k, v, grad_out = (x.repeat(2, 1, 1) for x in (q, k, v, grad_out))
    grads = (grad_out, torch.zeros(300, 2))
    actual = run(ours((ends, ends)), (q, k, v), grads)
    exact = run(
        lambda q, k, v: reference.prefix_attention(q, k, v, ends)[:2],
        [x.double() for x in (q, k, v)],
        [x.double() for x in grads],
    )
    for got, want in zip(actual, exact, strict=True):
        assert_accurate(got, want.nan_to_num() if want.dim() == 3 else want, units=50)


# --- layouts, sizes, repeats -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_strided_inputs(dtype):
    tree = TREES["groups"]()
    q, k, v, grad_out = make_inputs(tree, 4, 2, 24, 24, dtype)
    grad_lse = torch.zeros(tree.num_tokens, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = run(ours(tree), (q, k, v), (grad_out, grad_lse))
    layouts = {
        "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "size not last": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every second": lambda x: x.repeat_interleave(2, dim=0)[::2],
        "part of a wider tensor": lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
    }
    for layout in layouts.values():
        strided = [layout(x) for x in (q, k, v)]
        assert not all(x.is_contiguous() for x in strided)
        outputs = pykern.prefix_attention(*(x.requires_grad_() for x in strided), tree, return_lse=True)
        grads = torch.autograd.grad(outputs, strided, (layout(grad_out), grad_lse))
        for got, expected in zip((*outputs, *grads), want, strict=True):
            assert torch.equal(got, expected)


def test_bare_tensors_of_any_stride():
    tree = TREES["groups"]()
    q, k, v, _ = make_inputs(tree, 4, 2, 16, 16, torch.float32)
    strided = torch.stack([tree.subtree_end, tree.position], dim=1).unbind(1)
    assert torch.equal(pykern.prefix_attention(q, k, v, strided), pykern.prefix_attention(q, k, v, tree))


def test_expanded_inputs_and_gradient():
    tree = TREES["group"]()
    q, k, v, _ = make_inputs(tree, 4, 4, 16, 16, torch.float32)
    shared = [x[:, :1].clone().requires_grad_() for x in (k, v)]
    out = pykern.prefix_attention(q, shared[0].expand(-1, 4, -1), shared[1].expand(-1, 4, -1), tree)
    out.sum().backward()  # a gradient of stride 0
    grouped = [x[:, :1].clone().requires_grad_() for x in (k, v)]
    pykern.prefix_attention(q, *grouped, tree).sum().backward()
    for a, b in zip(shared, grouped, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_no_tokens(dtype):
    tree = pykern.PrefixTree.from_groups([], [])
    q, k, v, grad_out = make_inputs(tree, 4, 2, 16, 8, dtype)
    q.requires_grad_()
    out, lse = pykern.prefix_attention(q, k, v, tree, return_lse=True)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    out.backward(grad_out)
    assert q.grad.shape == (0, 4, 16)


def test_no_query_heads():
    tree = TREES["group"]()
    k = torch.randn(tree.num_tokens, 2, 8, requires_grad=True)
    out = pykern.prefix_attention(torch.randn(tree.num_tokens, 0, 8), k, k, tree)
    assert out.shape == (tree.num_tokens, 0, 8)
    out.sum().backward()
    assert (k.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit_with_any_number_of_threads(dtype, cpu_level):
    tree = pykern.PrefixTree.from_groups([300], [[70, 90, 120]])
    q, k, v, grad_out = make_inputs(tree, 4, 2, 32, 32, dtype)
    grads = (grad_out, torch.ones(tree.num_tokens, 4))
    with threads(1):
        once = run(ours(tree), (q, k, v), grads)
    for count in (2, 3, 5):
        with threads(count):
            again = run(ours(tree), (q, k, v), grads)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_many_key_tiles_share_query_tiles_without_stalling():
    """More threads than processors, one head: every thread waits for its predecessors' shares."""
    tree = pykern.PrefixTree.from_groups([900], [[100, 200, 50]])
    q, k, v, grad_out = make_inputs(tree, 1, 1, 8, 8, torch.float32)
    grads = (grad_out, torch.zeros(tree.num_tokens, 1))
    once = run(ours(tree), (q, k, v), grads)
    with threads(8):
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(once, run(ours(tree), (q, k, v), grads), strict=True))


# --- gradients as a user meets them ----------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
def test_only_some_inputs_need_a_gradient(wanted):
    tree = TREES["group"]()
    tensors = dict(zip("qkv", make_inputs(tree, 2, 1, 16, 16, torch.float32)[:3], strict=True))
    full = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    pykern.prefix_attention(*full.values(), tree).square().sum().backward()
    part = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    pykern.prefix_attention(*part.values(), tree).square().sum().backward()
    assert_grads({name: part[name] for name in wanted})
    for name, tensor in part.items():
        assert (tensor.grad is not None) == (name in wanted)
        if name in wanted:
            assert torch.equal(tensor.grad, full[name].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_through_lse_alone(dtype):
    tree = TREES["groups"]()
    q, k, v, _ = make_inputs(tree, 2, 1, 16, 16, dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(tree.num_tokens, 2, dtype=dtype)
    got = torch.autograd.grad(ours(tree)(*leaves)[1], leaves, weight)
    want = torch.autograd.grad(plain(tree)(*leaves)[1], leaves, weight, allow_unused=True)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    assert (got[2] == 0).all()


def test_without_gradients():
    tree = TREES["group"]()
    q, k, v, _ = make_inputs(tree, 2, 1, 16, 16, torch.float32)
    want = pykern.prefix_attention(q, k, v, tree)
    q.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = pykern.prefix_attention(q, k, v, tree)
        assert not out.requires_grad and torch.equal(out, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    tree = TREES["group"]()
    leaves = [x.requires_grad_() for x in make_inputs(tree, 4, 2, 16, 16, torch.float32)[:3]]

    def block(q, k, v, subtree_end, position):
        return pykern.prefix_attention(q.sin(), k, v, (subtree_end, position)).cos()

    arguments = (*leaves, tree.subtree_end, tree.position)
    want = torch.autograd.grad(block(*arguments).sum(), leaves)
    checkpoint(block, *arguments, use_reentrant=reentrant).sum().backward()
    for leaf, grad in zip(leaves, want, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("name", ["short group", "padded tail", "levels"])
def test_gradcheck(name):
    tree = {
        "short group": pykern.PrefixTree.from_groups([4], [[2, 0, 3]]),
        "padded tail": with_padding(pykern.PrefixTree.from_groups([3], [[2, 1]]), 2),
        "levels": pykern.PrefixTree.from_parents([2, 1, 2, 1], [-1, 0, 1, 1]),
    }[name]
    leaves = [x.requires_grad_() for x in make_inputs(tree, 4, 2, 3, 2, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: pykern.prefix_attention(q, k, v, tree), leaves)
    if name != "padded tail":  # lse is -inf there, which finite differences can't follow
        assert torch.autograd.gradcheck(ours(tree), leaves)
