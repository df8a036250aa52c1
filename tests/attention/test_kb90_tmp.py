"""The CUDA kernels of prefix attention's backward, by the raw op: out and lse are the reference's, rounded."""

import functools

import pytest
import torch

import pykern
from pykern.reference import attention as reference
from tests.attention.trees import TREES, make_inputs, random_tree, with_padding
from tests.support import KERNELS, assert_accurate, on, poison

RESULTS = ["grad_q", "grad_k", "grad_v", "grad_sinks"]
BF16, F16 = torch.bfloat16, torch.float16
OPTIONS = {
    "window": {"window": 37},
    "narrow window": {"window": 1},
    "softcap": {"softcap": 2.0},
    "slopes": {"alibi_slopes": True},
    "sinks": {"sinks": True},
    "window, slopes": {"window": 50, "alibi_slopes": True},
    "window, softcap": {"window": 70, "softcap": 1.5, "scale": 0.4},
    "all": {"window": 45, "softcap": 3.0, "sinks": True, "alibi_slopes": True, "scale": 0.3},
    "negative scale": {"scale": -0.2},
    "negative scale, all": {"window": 80, "softcap": 3.0, "sinks": True, "alibi_slopes": True, "scale": -0.3},
    "scale 0": {"scale": 0.0},
    "scale 0, sinks": {"scale": 0.0, "sinks": True, "alibi_slopes": True},
}


@pytest.fixture(params=[name for name in KERNELS if name == "emulated"])
def kernels(request):
    with on(request.param):
        yield torch.device("cuda" if request.param == "cuda" else "cpu")


def per_head(tokens, heads):
    """grad_lse, sinks and alibi_slopes."""
    generator = torch.Generator().manual_seed(7)
    grad_lse = torch.randn(tokens, heads, generator=generator)
    return grad_lse, torch.randn(heads, generator=generator), 0.3 * torch.rand(heads, generator=generator)


def expand(options, heads):
    """The options as keywords of the reference: tensors in the place of True."""
    _, sinks, slopes = per_head(0, heads)
    tensors = {"sinks": sinks, "alibi_slopes": slopes}
    return {name: tensors[name] if value is True else value for name, value in options.items()}


def by_reference(tree, inputs, grad_lse, options, dtype):
    """out, lse and the gradients of q, k, v and, where there are any, sinks; autograd in `dtype`."""
    q, k, v, grad_out = (x.to(dtype) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    if "sinks" in options:
        leaves.append(options["sinks"].requires_grad_())
    out, lse, _ = reference.prefix_attention(*leaves[:3], tree.subtree_end, tree.position, **options)
    outputs, grads = [out], [grad_out]
    if grad_lse is not None:
        outputs, grads = [out, lse], [grad_out, grad_lse.to(dtype)]
    gradients = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)
    return out.detach(), lse.detach(), *gradients


def by_kernels(kernels, tree, inputs, grad_lse, out, lse, options):
    """The gradients that the op makes of inputs, out and lse, on the CPU again."""
    q, k, v, grad_out = inputs
    rows = [grad_out, grad_lse, q, k, v, out, lse, *tree.tensors, options.get("sinks"), options.get("alibi_slopes")]
    scale = options.get("scale", max(q.shape[2], 1) ** -0.5)
    grads = torch.ops.pykern.prefix_attention_backward.default(
        *(x if x is None else move(x, kernels) for x in rows),
        scale,
        options.get("window", 0),
        options.get("softcap", 0.0),
    )
    return [x.cpu() for x in grads]


def move(tensor, device):
    """To a device with the strides it has, which Tensor.to may change."""
    if tensor.device == device:
        return tensor
    base = tensor.as_strided((tensor.untyped_storage().size() // tensor.element_size(),), (1,), 0).to(device)
    return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_gradients(actual, exact, baseline, factor=2.0):
    """Against float64 and PyTorch's own error. The gradient of sinks is float32, but made of a rounded out."""
    for name, got, want, other in zip(RESULTS, actual, exact, baseline, strict=False):
        rounding = torch.finfo(actual[0].dtype).eps / torch.finfo(got.dtype).eps
        assert got.is_contiguous(), name
        assert_accurate(got, want, other, factor=factor, units=rounding)


def check(kernels, tree, heads, key_heads, size, value_size, dtype, *, layout=None, with_grad_lse=True, **options):
    """All gradients against float64 and PyTorch's own error."""
    inputs = make_inputs(tree, heads, key_heads, size, value_size, dtype)
    options = expand(options, heads)
    grad_lse = per_head(tree.num_tokens, heads)[0] if with_grad_lse else None
    out, lse, *exact = by_reference(tree, inputs, grad_lse, options, torch.float64)
    baseline = by_reference(tree, inputs, grad_lse, options, dtype)[2:]
    given = [layout(x) for x in (*inputs, out.to(dtype))] if layout else [*inputs, out.to(dtype)]
    actual = by_kernels(kernels, tree, given[:4], grad_lse, given[4], lse.float(), options)
    assert len(exact) == 3 + ("sinks" in options)
    assert actual[3].shape == ((heads,) if "sinks" in options else (0,))
    assert [x.dtype for x in actual] == [dtype, dtype, dtype, torch.float32]
    assert_gradients(actual, exact, baseline)
    return actual


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TREES)
def test_trees(kernels, name):
    check(kernels, TREES[name](), 2, 1, 64, 64, BF16)


@pytest.mark.parametrize(
    ("size", "value_size"),
    [(1, 1), (24, 24), (32, 32), (40, 64), (72, 72), (80, 80), (96, 96), (128, 128), (127, 33), (192, 128), (256, 256)]
    + [(8, 200), (0, 16), (16, 0)],
)
def test_head_sizes(kernels, size, value_size):
    check(kernels, random_tree(5, 12, 50), 2, 1, size, value_size, BF16)


@pytest.mark.parametrize(("size", "value_size"), [(16, 16), (64, 64), (40, 24)])
def test_float16(kernels, size, value_size):
    check(kernels, random_tree(6, 12, 50), 4, 2, size, value_size, F16, sinks=True)


@pytest.mark.parametrize(
    ("heads", "key_heads"), [(1, 1), (3, 3), (4, 2), (3, 1), (4, 1), (6, 1), (8, 1), (16, 1), (24, 1), (32, 1), (14, 2)]
)
def test_head_groups(kernels, heads, key_heads):
    check(kernels, random_tree(9, 10, 24), heads, key_heads, 32, 32, BF16, window=40, alibi_slopes=True, sinks=True)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 33, 63, 64, 65, 127, 128, 129, 193])
def test_tokens(kernels, tokens):
    check(kernels, pykern.PrefixTree.from_groups([tokens], [[]]), 2, 2, 16, 16, BF16, sinks=True)


def test_no_tokens(kernels):
    tree = pykern.PrefixTree.from_groups([], [])
    grads = check(kernels, tree, 4, 2, 16, 8, BF16)
    assert [x.shape for x in grads] == [(0, 4, 16), (0, 2, 16), (0, 2, 8), (0,)]
    *_, grad_sinks = check(kernels, tree, 4, 2, 16, 8, BF16, sinks=True)
    assert torch.equal(grad_sinks, torch.zeros(4))


@pytest.mark.parametrize("seed", range(6))
def test_random_trees(kernels, seed):
    heads, key_heads, size = [(4, 4, 24), (4, 2, 64), (8, 1, 96)][seed % 3]
    tree = random_tree(200 + seed, nodes=2 + 5 * seed, longest=40)
    check(kernels, tree, heads, key_heads, size, size, BF16, **list(OPTIONS.values())[seed])


def test_many_tiles(kernels):
    """Enough tokens that a block looks through more tiles than a warp has lanes."""
    tree = pykern.PrefixTree.from_groups([70], [[60, 1800, 100, 30]])
    check(kernels, tree, 1, 1, 16, 16, BF16, window=40)


# --- options -------------------------------------------------------------------------------------------------------


def bushy_tree():
    """Of some more than two tiles of tokens; a leaf ends amid a tile, another on its border."""
    return pykern.PrefixTree.from_groups([70], [[40, 18, 0, 19]])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(kernels, options):
    check(kernels, bushy_tree(), 4, 1, 64, 64, BF16, **options)


@pytest.mark.parametrize("name", ["softcap", "sinks", "all", "negative scale, all"])
@pytest.mark.parametrize("size", [128, 192, 256])
def test_options_of_large_heads(kernels, name, size):
    """Their tiles are others: fewer keys of a warp, operands that registers can't hold."""
    check(kernels, bushy_tree(), 2, 1, size, 128 if size == 192 else size, BF16, **OPTIONS[name])


@pytest.mark.parametrize("options", [{}, {"sinks": True}], ids=["without sinks", "with sinks"])
def test_without_a_gradient_of_lse(kernels, options):
    check(kernels, TREES["groups"](), 2, 1, 64, 64, BF16, with_grad_lse=False, **options)


def test_a_sink_of_minus_infinity_is_none(kernels):
    tree = TREES["groups"]()
    inputs = make_inputs(tree, 2, 1, 32, 32, BF16)
    grad_lse, *_ = per_head(tree.num_tokens, 2)
    out, lse, *_ = by_reference(tree, inputs, grad_lse, {}, torch.float64)
    run = functools.partial(by_kernels, kernels, tree, inputs, grad_lse, out.to(BF16), lse.float())
    without, with_sinks = run({}), run({"sinks": torch.full((2,), -torch.inf)})
    assert all(torch.equal(a, b) for a, b in zip(without[:3], with_sinks[:3], strict=True))
    assert torch.equal(with_sinks[3], torch.zeros(2))


def test_large_logits(kernels):
    tree = TREES["groups"]()
    inputs = make_inputs(tree, 2, 1, 32, 32, BF16)
    inputs = (inputs[0] * 30, *inputs[1:])
    out, lse, *exact = by_reference(tree, inputs, None, {}, torch.float64)
    baseline = by_reference(tree, inputs, None, {}, BF16)[2:]
    actual = by_kernels(kernels, tree, inputs, None, out.to(BF16), lse.float(), {})
    assert_gradients(actual, exact, baseline)


# --- what must not be read, or not reach further ------------------------------------------------------------------


def seen_by(tree, window=None):
    visible = reference.visibility(tree.subtree_end, tree.position, window)
    return visible.any(dim=1), visible.any(dim=0)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all options"])
def test_padding_may_hold_anything(kernels, size, options):
    """Queries that see nothing and keys that none sees, at the end and between prompts."""
    ends = pykern.PrefixTree.from_groups([50, 40], [[10, 15], []]).subtree_end.clone()
    ends[75:91] = torch.arange(75, 91, dtype=torch.int32)  # the second prompt's first tokens
    tree = with_padding(pykern.PrefixTree(ends), 90)
    inputs = make_inputs(tree, 2, 1, size, size, BF16)
    grad_lse, *_ = per_head(tree.num_tokens, 2)
    options = expand(options, 2)
    out, lse, *exact = by_reference(tree, inputs, grad_lse, options, torch.float64)
    baseline = by_reference(tree, inputs, grad_lse, options, BF16)[2:]
    out = out.to(BF16)
    sees, seen = seen_by(tree, options.get("window"))
    assert not sees[75:91].any() and not seen[75:91].any() and not sees[-90:].any()
    for rows, tensors in ((~sees, (inputs[0], inputs[3], out, grad_lse)), (~seen, inputs[1:3])):
        for tensor in tensors:
            tensor[rows] = float("nan")
    actual = by_kernels(kernels, tree, inputs, grad_lse, out, lse.float(), options)
    assert_gradients(actual, exact, baseline)
    assert not actual[0][~sees].any() and not actual[1][~seen].any() and not actual[2][~seen].any()


def test_a_query_that_sees_others_but_not_itself(kernels):
    """Bare tensors need not be a tree: here keys of odd rows are seen by none, while their queries see."""
    ends = torch.where(torch.arange(150) % 2 == 0, 150, 0).to(torch.int32)
    tree = pykern.PrefixTree.from_groups([150], [[]])
    bounds, order = reference.tree_tiles(ends, tree.position)
    inputs = make_inputs(tree, 2, 1, 32, 32, BF16)
    for tensor in inputs[1:3]:
        tensor[1::2] = 0  # for the reference; the kernels get NaN
    exact_tree = Bare(ends, tree.position, bounds, order)
    out, lse, *exact = by_reference(exact_tree, inputs, None, {}, torch.float64)
    baseline = by_reference(exact_tree, inputs, None, {}, BF16)[2:]
    for tensor in inputs[1:3]:
        poison(tensor[1::2])
    actual = by_kernels(kernels, exact_tree, inputs, None, out.to(BF16), lse.float(), {})
    assert_gradients(actual, exact, baseline)


class Bare:
    """The tensors of a tree, unchecked."""

    def __init__(self, subtree_end, position, bounds, order):
        self.subtree_end, self.position = subtree_end, position
        self.tensors = (subtree_end, position, bounds, order)
        self.num_tokens = len(subtree_end)


def test_any_thresholds_follow_the_rule(kernels):
    """Intervals that don't nest."""
    generator = torch.Generator().manual_seed(1)
    begins = torch.arange(200)
    ends = (begins + torch.randint(0, 150, (200,), generator=generator)).clamp(max=200).to(torch.int32)
    position = begins.to(torch.int32)
    check(kernels, Bare(ends, position, *reference.tree_tiles(ends, position)), 4, 2, 32, 32, BF16, window=90)


# --- layouts and repeats ------------------------------------------------------------------------------------------


LAYOUTS = {
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "size not last": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every second token": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "an odd offset": lambda x: torch.cat([x[:1, :, :1].expand(x.shape[0], -1, -1), x], dim=2)[:, :, 1:],
    "part of wider rows": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], dim=2)[:, :, : x.shape[2]],
}


@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strided_inputs(kernels, layout, size):
    tree = TREES["short group"]()
    strided = check(kernels, tree, 4, 2, size, size, BF16, layout=layout)
    assert all(torch.equal(a, b) for a, b in zip(strided, check(kernels, tree, 4, 2, size, size, BF16), strict=True))


def test_gradient_of_stride_0(kernels):
    tree = TREES["short group"]()
    inputs = make_inputs(tree, 2, 2, 16, 16, BF16)
    out, lse, *_ = by_reference(tree, inputs, None, {}, torch.float64)
    run = functools.partial(by_kernels, kernels, tree, grad_lse=None, out=out.to(BF16), lse=lse.float(), options={})
    ones = torch.ones((), dtype=BF16)
    expanded = run(inputs=(*inputs[:3], ones.expand(inputs[3].shape)))
    plain = run(inputs=(*inputs[:3], torch.ones_like(inputs[3])))
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


@pytest.mark.parametrize(("size", "value_size"), [(64, 64), (192, 128)])
def test_repeats_bit_for_bit(kernels, size, value_size):
    once, again = (check(kernels, bushy_tree(), 4, 2, size, value_size, BF16, **OPTIONS["all"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_gradients_of_shared_keys_are_summed_in_float32(kernels):
    """No rounding between the queries of a key: the error is that of one rounding of the result."""
    tree = pykern.PrefixTree.from_groups([32], [[16] * 8])
    inputs = make_inputs(tree, 8, 1, 32, 32, BF16)
    out, lse, *exact = by_reference(tree, inputs, None, {}, torch.float64)
    baseline = by_reference(tree, inputs, None, {}, BF16)[2:]
    actual = by_kernels(kernels, tree, inputs, None, out.to(BF16), lse.float(), {})
    for got, want, other in zip(actual[1:3], exact[1:3], baseline[1:3], strict=True):
        assert_accurate(got, want, other, factor=0.5)
