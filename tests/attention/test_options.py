"""Options of prefix_attention: window, softcap, sinks, ALiBi, largest logits, the order-invariant mode."""

import math
import random

import pytest
import torch

import pykern
from pykern.reference import attention as reference
from tests.attention.checks import OPTIONS, RESULTS, check, make_sinks, make_slopes, ours, run
from tests.attention.trees import TREES, make_inputs, random_tree, with_padding
from tests.support import assert_accurate, assert_grads, check_op, compile_whole, poison, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_DTYPES = [*DTYPES, torch.float64]
ALL = OPTIONS["all"]


# Of one token alone, gradients of logits cancel to nothing: see the window of one.
@pytest.mark.parametrize("name", [name for name in TREES if name != "one token"])
@pytest.mark.parametrize("option", OPTIONS)
def test_accuracy(option, name):
    check(TREES[name](), 4, 2, 32, 24, torch.float32, **OPTIONS[option])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_accuracy_on_every_instruction_set(cpu_level, option, dtype):
    check(random_tree(3, 16, 70), 6, 2, 40, 24, dtype, **OPTIONS[option])


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 1), (10, 2), (16, 1), (200, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_groups(heads, key_heads, dtype):
    check(random_tree(9, 10, 30), heads, key_heads, 16, 16, dtype, **ALL)


@pytest.mark.parametrize(("size", "value_size"), [(1, 3), (3, 1), (80, 96), (127, 5), (256, 256), (192, 128)])
def test_head_sizes(size, value_size):
    check(random_tree(7, 10, 40), 2, 1, size, value_size, torch.bfloat16, **ALL)


@pytest.mark.parametrize("seed", range(40))
def test_random_trees_and_options(seed):
    choose = random.Random(seed)
    options = {
        "window": choose.choice([None, 2, choose.randrange(2, 120)]),
        "softcap": choose.choice([None, choose.uniform(0.5, 30.0)]),
        "scale": choose.choice([None, 0.3, -0.4, 0.0]),
        "sinks": choose.random() < 0.5,
        "alibi": choose.random() < 0.5,
    }
    tree = random_tree(200 + seed, nodes=1 + seed, longest=choose.choice([5, 60, 150]))
    key_heads = choose.choice([1, 2, 3])
    check(
        tree, key_heads * choose.choice([1, 2, 5]), key_heads, 16, 24, choose.choice([torch.float32, torch.bfloat16]),
        order_invariant=choose.random() < 0.5, **options,
    )  # fmt: skip


@pytest.mark.parametrize("option", ["window", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_with_large_key_tiles(option, dtype):
    tree = pykern.PrefixTree.from_groups([450, 70], [[90, 33, 141, 1, 64], [100, 0, 128]])
    check(tree, 4, 4, 16, 16, dtype, **OPTIONS[option])


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 100.0])
def test_softcap_of_small_and_large_logits(magnitude):
    check(TREES["group"](), 2, 2, 16, 16, torch.float32, softcap=3.0, magnitude=magnitude)


def test_options_that_change_nothing():
    tree = TREES["groups"]()
    q, k, v, _ = make_inputs(tree, 4, 2, 16, 16, torch.float32)
    want = pykern.prefix_attention(q, k, v, tree, return_lse=True)
    longest = int(tree.position.max()) + 1
    for options in (
        {"window": longest},
        {"window": 2**40},
        {"sinks": torch.full((4,), -torch.inf)},
        {"alibi_slopes": torch.zeros(4)},
        {"softcap": 1e6},
    ):
        got = pykern.prefix_attention(q, k, v, tree, return_lse=True, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_window_of_one_gives_the_own_value(dtype, cpu_level):
    """The gradients of logits cancel; what is left of them is a rounding of their terms."""
    tree = random_tree(4, 12, 40)
    *inputs, grad_out = make_inputs(tree, 2, 2, 16, 16, dtype)
    out, lse, *grads = run(ours(tree, window=1), inputs, [grad_out])
    products = (inputs[0].double() * inputs[1].double()).sum(dim=-1) / 4
    assert_accurate(out, inputs[2])
    assert_accurate(lse, products, units=8.0)
    tolerance = 50 * torch.finfo(dtype).eps
    for got, want in zip(grads, (torch.zeros_like(out), torch.zeros_like(out), grad_out), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_window_counts_along_the_path():
    """A response's first tokens see the end of the prompt, however many responses lie between."""
    tree = pykern.PrefixTree.from_groups([100], [[80] * 5])
    q, k, v, _ = make_inputs(tree, 2, 1, 16, 16, torch.float32)
    out = pykern.prefix_attention(q, k, v, tree, window=30)
    for response in range(5):
        rows = torch.cat([torch.arange(100), 100 + 80 * response + torch.arange(80)])
        alone = pykern.PrefixTree.from_groups([180], [[]])
        want = pykern.prefix_attention(q[rows], k[rows], v[rows], alone, window=30)
        torch.testing.assert_close(out[rows], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_sink_takes_all_the_weight_of_infinitely_small_logits(dtype, cpu_level):
    tree = TREES["short group"]()
    q, k, v, _ = make_inputs(tree, 1, 1, 8, 8, dtype)
    q, k = q.abs(), k.abs()
    q[5] = -torch.inf
    out, lse = pykern.prefix_attention(q, k, v, tree, sinks=torch.tensor([0.25]), return_lse=True)
    assert (out[5] == 0).all()
    torch.testing.assert_close(lse[5], torch.tensor([0.25], dtype=lse.dtype))
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_sinks_far_from_the_logits(sink):
    tree = TREES["group"]()
    q, k, v, grad_out = make_inputs(tree, 2, 1, 16, 16, torch.float32)
    sinks = torch.full((2,), sink, requires_grad=True)
    out, lse = pykern.prefix_attention(q, k, v, tree, sinks=sinks, return_lse=True)
    if sink > 0:
        assert (out == 0).all() and (lse == sink).all()
    else:
        assert torch.equal(out, pykern.prefix_attention(q, k, v, tree))
    out.backward(grad_out)
    assert (sinks.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_sinks_of_any_dtype(dtype):
    tree = TREES["group"]()
    q, k, v, grad_out = make_inputs(tree, 4, 2, 16, 16, torch.float32)
    sinks, slopes = (make(4).to(dtype) for make in (make_sinks, make_slopes))
    sinks.requires_grad_()
    out = pykern.prefix_attention(q, k, v, tree, sinks=sinks, alibi_slopes=slopes)
    out.backward(grad_out)
    assert sinks.grad.dtype == dtype
    same = sinks.detach().float().requires_grad_()
    want = pykern.prefix_attention(q, k, v, tree, sinks=same, alibi_slopes=slopes.float())
    want.backward(grad_out)
    assert torch.equal(out, want)
    assert torch.equal(sinks.grad, same.grad.to(dtype))


# --- what must not be read, or not reach further ---------------------------------------------------


@pytest.mark.parametrize("order_invariant", [False, True])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_rows_that_see_nothing(option, dtype, order_invariant):
    options = OPTIONS[option]
    tree = with_padding(pykern.PrefixTree.from_groups([20], [[5, 6]]), 100)
    q, k, v, grad_out = make_inputs(tree, 4, 2, 16, 16, dtype)
    grad_lse = torch.ones(131, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    sinks = [make_sinks(4)] if options.get("sinks") else []
    function = ours(tree, return_max_logits=True, order_invariant=order_invariant, **options)
    clean = run(function, (q, k, v, *sinks), (grad_out, grad_lse))
    for tensor in (q, k, v, grad_out):
        poison(tensor[31:])
    poison(grad_lse[31:])
    out, lse, max_logits, *grads = run(function, (q, k, v, *sinks), (grad_out, grad_lse))
    assert (out[31:] == 0).all()
    assert (lse[31:] == float("-inf")).all()
    for grad in grads[:3]:
        assert (grad[31:] == 0).all()
    for got, want in zip((out, lse, *grads[:3]), (*clean[:2], *clean[3:6]), strict=True):
        assert torch.equal(got[:31], want[:31])
    assert torch.equal(max_logits, clean[2]) and max_logits.isfinite().all()
    for got, want in zip(grads[3:], clean[6:], strict=True):
        assert torch.equal(got, want) and got.isfinite().all()


@pytest.mark.parametrize("order_invariant", [False, True])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_nothing_is_seen_at_all(dtype, order_invariant):
    tree = TREES["all padding"]()
    inputs = [*make_inputs(tree, 2, 1, 8, 8, dtype)[:3], make_sinks(2)]
    options = {"return_max_logits": True, "order_invariant": order_invariant}
    out, lse, max_logits, *grads = run(ours(tree, **options, **ALL), inputs, [torch.ones(70, 2, 8, dtype=dtype)])
    assert (lse == -torch.inf).all() and (max_logits == -torch.inf).all()
    assert (out == 0).all() and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("order_invariant", [False, True])
def test_poison_stays_on_its_own_paths_and_in_its_window(order_invariant, which, value, cpu_level):
    for dtype in (torch.float32, torch.bfloat16):
        check_poison(dtype, which, value, order_invariant)


def check_poison(dtype, which, value, order_invariant):
    tree, token, window = pykern.PrefixTree.from_groups([170], [[60, 30, 25]]), 150, 33
    inputs = dict(zip(("q", "k", "v", "grad_out"), make_inputs(tree, 2, 1, 16, 16, dtype), strict=True))
    function = ours(tree, order_invariant=order_invariant, window=window, sinks=True, alibi=True, softcap=4.0)

    def results():
        grads = (inputs["grad_out"], torch.zeros(tree.num_tokens, 2))
        return run(function, (inputs["q"], inputs["k"], inputs["v"], make_sinks(2)), grads)[:5]

    clean = results()
    inputs[which][token] = value
    dirty = results()
    visible = reference.visibility(tree.subtree_end, tree.position, window)
    sees, seen = visible[:, token], visible[token]
    own = torch.arange(tree.num_tokens) == token
    queries = {"q": own, "grad_out": own, "k": sees, "v": sees}[which]
    keys = seen if which in ("q", "grad_out") else (visible & sees[:, None]).any(dim=0)
    for index, (name, got, want) in enumerate(zip(RESULTS, dirty, clean, strict=True)):
        untouched = ~(queries if index < 3 else keys)
        torch.testing.assert_close(got[untouched], want[untouched], rtol=2e-2, atol=2e-2, msg=name)
        assert got[untouched].isfinite().all()
    # A softcap bends infinite logits into finite ones.
    if math.isnan(value) or which in ("v", "grad_out"):
        assert not dirty[4 if which == "grad_out" else 0].isfinite().all()


# --- largest logits --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_largest_logits_hold_what_is_seen_alone(dtype, cpu_level):
    tree = pykern.PrefixTree.from_groups([70], [[20, 30]])
    q, k, v, _ = make_inputs(tree, 2, 1, 4, 4, dtype)
    q, k = q.abs(), k.abs()
    k[75] = 1000.0  # seen by the first response alone, and queries there are small
    q[70:90] = 0.0
    sinks = torch.full((2,), 1e5)
    _, max_logits = pykern.prefix_attention(q, k, v, tree, sinks=sinks, return_max_logits=True)
    want = reference.prefix_attention(q.double(), k.double(), v.double(), tree.subtree_end)[2]
    assert max_logits.shape == (2,) and max_logits.max() < 100
    assert_accurate(max_logits, want, units=200.0 if dtype in (torch.bfloat16, torch.float16) else 8.0)


def test_largest_logits_of_nan_and_infinite_products(cpu_level):
    tree = TREES["group"]()
    q, k, v, _ = make_inputs(tree, 3, 3, 4, 4, torch.float32)
    q[50, 0, 0] = float("nan")
    q[50, 1] = float("inf")
    k[:51, 1].abs_()
    max_logits = pykern.prefix_attention(q, k, v, tree, return_max_logits=True)[1]
    assert max_logits[0].isnan() and max_logits[1] == float("inf") and max_logits[2].isfinite()


def test_largest_logits_have_no_gradient():
    tree = TREES["short group"]()
    leaves = [x.requires_grad_() for x in make_inputs(tree, 2, 1, 8, 8, torch.float32)[:3]]
    out, max_logits = pykern.prefix_attention(*leaves, tree, return_max_logits=True)
    assert out.requires_grad and not max_logits.requires_grad


def test_empty_tree_has_no_largest_logits():
    tree = pykern.PrefixTree.from_groups([], [])
    inputs = [*make_inputs(tree, 4, 2, 16, 8, torch.float32)[:3], make_sinks(4)]
    out, lse, max_logits, *grads = run(ours(tree, return_max_logits=True, **ALL), inputs, [torch.zeros(0, 4, 8)])
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    assert (max_logits == -torch.inf).all() and max_logits.shape == (4,)
    assert (grads[3] == 0).all() and grads[3].shape == (4,)


# --- the order-invariant mode ----------------------------------------------------------------------

INVARIANT_TREES = {
    "group": lambda: pykern.PrefixTree.from_groups([130], [[40, 64, 1, 0, 77]]),
    "long prompt": lambda: pykern.PrefixTree.from_groups([600], [[30, 200]]),
    "forest": lambda: random_tree(11, 14, 90),
    "levels": lambda: pykern.PrefixTree.from_parents([70, 130, 40, 250, 20], [-1, 0, 1, 1, 0]),
    "every token branches": TREES["every token branches"],
    "padding inside": lambda: pykern.PrefixTree(
        torch.tensor([300, 1, *[300] * 148, *[220] * 70, *[300] * 79, 299], dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"softcap": 4.0}, {"scale": -0.2}, ALL], ids=str)
@pytest.mark.parametrize("name", INVARIANT_TREES)
def test_packed_equals_alone_bit_for_bit(name, options):
    for dtype in ALL_DTYPES:
        check_packed_equals_alone(INVARIANT_TREES[name](), 4, 2, dtype, options)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2), (40, 1)])
def test_packed_equals_alone_on_every_instruction_set(cpu_level, heads, key_heads, dtype):
    for options in ({}, ALL):
        check_packed_equals_alone(random_tree(12, 9, 120), heads, key_heads, dtype, options)


def check_packed_equals_alone(tree, heads, key_heads, dtype, options):
    q, k, v, _ = make_inputs(tree, heads, key_heads, 24, 20, dtype)
    sinks = [make_sinks(heads)] if options.get("sinks") else []
    packed = ours(tree, order_invariant=True, **options)(q, k, v, *sinks)
    for path in tree.sequence_rows.split(tree.cu_seqlens.diff().tolist()):
        alone = pykern.PrefixTree.from_groups([len(path)], [[]])
        got = ours(alone, order_invariant=True, **options)(q[path], k[path], v[path], *sinks)
        for a, b in zip(got, packed, strict=True):
            assert torch.equal(a, b[path])


def test_packed_equals_alone_beside_nan_and_infinity():
    tree = INVARIANT_TREES["group"]()
    q, k, v, _ = make_inputs(tree, 2, 1, 16, 16, torch.float32)
    k[150], v[153], v[10], v[290, 0, 3] = float("nan"), float("inf"), float("-inf"), float("nan")
    packed = pykern.prefix_attention(q, k, v, tree, order_invariant=True)
    for path in tree.sequence_rows.split(tree.cu_seqlens.diff().tolist()):
        alone = pykern.PrefixTree.from_groups([len(path)], [[]])
        got = pykern.prefix_attention(q[path], k[path], v[path], alone, order_invariant=True)
        torch.testing.assert_close(got, packed[path], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_the_order_invariant_mode(dtype, option, cpu_level):
    check(random_tree(13, 12, 90), 6, 2, 24, 40, dtype, order_invariant=True, **OPTIONS[option])


def test_order_invariant_mode_takes_any_thresholds():
    """A bare tuple may hold intervals that don't nest, and positions that count nothing."""
    generator = torch.Generator().manual_seed(1)
    begins = torch.arange(300)
    ends = (begins + torch.randint(0, 200, (300,), generator=generator)).clamp(max=400).to(torch.int32)
    position = torch.randint(-1000, 1000, (300,), generator=generator, dtype=torch.int32)
    q, k, v, _ = (torch.cat([x, x]) for x in make_inputs(TREES["causal"](), 2, 1, 16, 16, torch.float32))
    for window in (None, 700):
        want = reference.prefix_attention(q.double(), k.double(), v.double(), ends, position, window=window)
        for order_invariant in (False, True):
            got = pykern.prefix_attention(
                q, k, v, (ends, position), window=window, order_invariant=order_invariant, return_lse=True
            )
            assert_accurate(got[0], want[0], units=50)
            assert_accurate(got[1], want[1], units=50)


# --- repeats, gradients as a user meets them -------------------------------------------------------


@pytest.mark.parametrize("order_invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit_with_any_number_of_threads(dtype, order_invariant, cpu_level):
    tree = pykern.PrefixTree.from_groups([300], [[70, 90, 120]])
    q, k, v, grad_out = make_inputs(tree, 4, 2, 32, 32, dtype)
    inputs, grads = (q, k, v, make_sinks(4)), (grad_out, torch.ones(tree.num_tokens, 4))
    function = ours(tree, return_max_logits=True, order_invariant=order_invariant, **ALL)
    with threads(1):
        once = run(function, inputs, grads)
    for count in (2, 3, 5):
        with threads(count):
            again = run(function, inputs, grads)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option):
    options = {**OPTIONS[option]}
    if "window" in options:
        options["window"] = min(options["window"], 3)
    tree = pykern.PrefixTree.from_parents([2, 1, 2, 1], [-1, 0, 1, 1])
    leaves = [*make_inputs(tree, 4, 2, 3, 2, torch.float64)[:3]]
    leaves += [make_sinks(4).double()] if options.get("sinks") else []
    assert torch.autograd.gradcheck(ours(tree, **options), [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("wanted", ["q", "sinks", "v and sinks"])
def test_only_some_inputs_need_a_gradient(wanted):
    tree = TREES["group"]()
    names = ["q", "k", "v", "sinks"]
    tensors = dict(zip(names, (*make_inputs(tree, 2, 1, 16, 16, torch.float32)[:3], make_sinks(2)), strict=True))
    full = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    ours(tree, **ALL)(*full.values())[0].square().sum().backward()
    part = {name: tensor.clone().requires_grad_(name in wanted.split()) for name, tensor in tensors.items()}
    ours(tree, **ALL)(*part.values())[0].square().sum().backward()
    assert_grads({name: part[name] for name in names if name in wanted.split()})
    for name, tensor in part.items():
        assert (tensor.grad is not None) == (name in wanted.split())
        assert tensor.grad is None or torch.equal(tensor.grad, full[name].grad)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("order_invariant", [False, True])
def test_opcheck(order_invariant, dtype):
    tree = TREES["short group"]()
    q, k, v, grad_out = make_inputs(tree, 4, 2, 6, 5, dtype)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    per_head = (make_sinks(4).to(statistic), make_slopes(4).to(statistic))
    score = (0.3, 5, 2.0)
    forward = (q, k, v, *tree.tensors, *per_head, *score, True, order_invariant)
    check_op(torch.ops.pykern.prefix_attention_forward.default, forward)
    out, lse, _ = torch.ops.pykern.prefix_attention_forward.default(*forward)
    backward = (grad_out, torch.ones_like(lse), q, k, v, out, lse, *tree.tensors, *per_head, *score)
    check_op(torch.ops.pykern.prefix_attention_backward.default, backward)


@pytest.mark.parametrize("order_invariant", [False, True])
def test_compiles_whole(order_invariant):
    tree = TREES["group"]()

    def function(q, k, v, sinks):
        out, lse, max_logits = ours(tree, return_max_logits=True, order_invariant=order_invariant, **ALL)(
            q * 2, k, v, sinks
        )
        return out.cos().sum() + lse.sum() + max_logits.sum()

    leaves = [*make_inputs(tree, 4, 2, 16, 16, torch.float32)[:3], make_sinks(4)]
    leaves = [x.requires_grad_() for x in leaves]
    want = torch.autograd.grad(function(*leaves), leaves)
    got = torch.autograd.grad(compile_whole(function)(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    tree = TREES["group"]()
    leaves = [*make_inputs(tree, 4, 2, 16, 16, torch.float32)[:3], make_sinks(4)]
    leaves = [x.requires_grad_() for x in leaves]
    want = torch.autograd.grad(ours(tree, **ALL)(*leaves)[0].cos().sum(), leaves)
    checkpoint(ours(tree, **ALL), *leaves, use_reentrant=reentrant)[0].cos().sum().backward()
    for leaf, grad in zip(leaves, want, strict=True):
        assert torch.equal(leaf.grad, grad)


# --- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window: expected at least 1 token, got 0; None is no window"),
        ({"window": -3}, ValueError, "window: expected at least 1 token, got -3"),
        ({"window": 2.0}, TypeError, "window: expected an integer or None, got float"),
        ({"window": True}, TypeError, "window: expected an integer or None, got bool"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0, got 0.0; None is no softcap"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a finite number above 0, got -1.0"),
        ({"softcap": float("nan")}, ValueError, "softcap: expected a finite number above 0, got nan"),
        ({"softcap": float("inf")}, ValueError, "softcap: expected a finite number above 0, got inf"),
        (
            {"scale": torch.ones((), requires_grad=True)},
            TypeError,
            "scale: expected a number, got a tensor that requires a gradient",
        ),
        ({"softcap": torch.ones((), requires_grad=True)}, TypeError, "softcap: expected a number, got a tensor that"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks: expected a tensor, got list"),
        ({"sinks": torch.zeros(4).int()}, TypeError, "sinks: expected a floating dtype, got torch.int32"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks: expected one value per query head, \[4\], got \(2,\)"),
        ({"sinks": torch.zeros(4, 1)}, ValueError, r"sinks: expected one value per query head, \[4\], got \(4, 1\)"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks: expected q's device cpu, got meta"),
        ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes: expected a tensor, got float"),
        ({"alibi_slopes": torch.ones(4).bool()}, TypeError, "alibi_slopes: expected a floating dtype, got torch.bool"),
        ({"alibi_slopes": torch.zeros(5)}, ValueError, r"alibi_slopes: expected one value per query head, \[4\]"),
        (
            {"alibi_slopes": torch.zeros(4, device="meta")},
            ValueError,
            "alibi_slopes: expected q's device cpu, got meta",
        ),
    ],
)
def test_refused(options, error, message):
    tree = pykern.PrefixTree.from_groups([5], [[2, 3]])
    q, k, v, _ = make_inputs(tree, 4, 2, 8, 8, torch.float32)
    with pytest.raises(error, match=message) as caught:
        pykern.prefix_attention(q, k, v, tree, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(10, 4)}, "q: expected 3 dimensions, got 2"),
        ({"k": torch.zeros(10, 3, 8)}, "q: expected a multiple of 3 heads, got 4|v: expected size 3"),
        ({"subtree_end": torch.zeros(10, dtype=torch.int64)}, "subtree_end: expected [a-z0-9]+, got [a-z0-9]+"),
        ({"subtree_end": torch.zeros(3, dtype=torch.int32)}, "subtree_end: expected size 10"),
        ({"position": torch.zeros(3, dtype=torch.int32)}, "position: expected size 10"),
        ({"bounds": torch.zeros(2, 4, dtype=torch.int32)}, "bounds: expected size 1"),
        ({"order": torch.zeros(1, 1, dtype=torch.int32)}, "order: expected size 2"),
        ({"order": torch.ones(2, 1, dtype=torch.int32)}, "order: expected each block once"),
        ({"sinks": torch.zeros(3)}, "sinks: expected size 4"),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, "sinks: expected [a-z0-9]+, got [a-z0-9]+"),
        ({"alibi_slopes": torch.zeros(8)[::2]}, "alibi_slopes: expected a contiguous tensor"),
        ({"window": -1}, "window: expected at least 1 token, or 0 for none, got -1"),
        ({"softcap": -1.0}, "softcap: expected a finite number above 0"),
        ({"softcap": float("inf")}, "softcap: expected a finite number above 0"),
    ],
)
def test_raw_ops_have_checks_of_their_own(change, message):
    tree = pykern.PrefixTree.from_groups([5], [[2, 3]])
    q, k, v, grad_out = make_inputs(tree, 4, 2, 8, 8, torch.float32)
    names = ("subtree_end", "position", "bounds", "order")
    given = {"q": q, "k": k, "v": v, **dict(zip(names, tree.tensors, strict=True)), "sinks": None}
    given |= {"alibi_slopes": None, "scale": 1.0, "window": 0, "softcap": 0.0}
    ends = {"return_max_logits": False, "order_invariant": False}
    out, lse, _ = torch.ops.pykern.prefix_attention_forward(**given, **ends)
    torch.ops.pykern.prefix_attention_backward(grad_out=grad_out, grad_lse=None, out=out, lse=lse, **given)
    given |= change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pykern.prefix_attention_forward(**given, **ends)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pykern.prefix_attention_backward(grad_out=grad_out, grad_lse=None, out=out, lse=lse, **given)
