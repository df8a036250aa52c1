"""The CUDA kernels of prefix attention's forward: head sizes, groups of heads, options, borders of tiles."""

import itertools
from contextlib import contextmanager

import pytest
import torch

import pykern
from pykern.reference import attention as reference
from tests.attention.trees import TREES, make_inputs, random_tree, with_padding
from tests.support import KERNELS, assert_accurate, emulator, on

# What the op runs on: kernels for all architectures, or those for one.
FORWARD_KERNELS = [name for name in KERNELS if name != "cpu"]
FOR_ONE_ARCHITECTURE = pytest.mark.parametrize(
    "place", [name for name in FORWARD_KERNELS if name != "emulated 8.0"], indirect=True
)
# The order-invariant mode has no kernels for one architecture.
FOR_ALL_ARCHITECTURES = pytest.mark.parametrize(
    "place", [name for name in FORWARD_KERNELS if name != "emulated"], indirect=True
)
BF16, F16 = torch.bfloat16, torch.float16


@contextmanager
def one_order(place):
    """On the emulator, launches within the block run in one order of threads only."""
    if place.type != "cpu":
        yield
        return
    before = emulator().orders()
    emulator().set_orders(before[:1])
    try:
        yield
    finally:
        emulator().set_orders(before)


@pytest.fixture(params=FORWARD_KERNELS)
def place(request):
    """Runs the test once on each set of kernels; the value is the torch device for its tensors."""
    with on(request.param) as device:
        yield device


def forward(tree, q, k, v, *, scale=None, window=None, softcap=None, sinks=None, alibi_slopes=None, invariant=False):
    """out, lse and max_logits, on the CPU, by the raw op on the tree's device."""
    device = tree.subtree_end.device
    per_head = [None if x is None else x.float().to(device) for x in (sinks, alibi_slopes)]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    results = torch.ops.pykern.prefix_attention_forward.default(
        *(x.to(device) for x in (q, k, v)),
        *tree.tensors,
        *per_head,
        scale,
        window or 0,
        softcap or 0.0,
        True,
        invariant,
    )
    return [result.cpu() for result in results]


def check(tree, inputs, place, invariant=False, **options):
    """All three results against float64 and PyTorch's own error; returns them."""
    q, k, v = inputs
    ends, position = tree.subtree_end.cpu(), tree.position.cpu()
    actual = forward(tree.to(place), q, k, v, invariant=invariant, **options)
    exact = reference.prefix_attention(*(x.double() for x in inputs), ends, position, **options)
    baseline = reference.prefix_attention(*inputs, ends, position, **options)
    assert [x.dtype for x in actual] == [q.dtype, torch.float32, torch.float32]
    for got, want, other in zip(actual, exact, baseline, strict=True):
        # Products of a few keys or with a scale of 0 may be exact in PyTorch; ours are rounded in float32.
        assert_accurate(got, want, other, units=1.0 if got is actual[0] else 4.0)
    return actual


def inputs_of(tree, heads=4, key_heads=2, size=32, value_size=None, dtype=BF16, seed=0):
    return make_inputs(tree, heads, key_heads, size, size if value_size is None else value_size, dtype, seed)[:3]


def padding_between() -> pykern.PrefixTree:
    """Two groups with padding of more than a tile between them and a little behind; in the second one, a padding
    token after every seventh token."""
    groups = pykern.PrefixTree.from_groups([40], [[30, 9]]).subtree_end
    gap = torch.arange(79, 79 + 100, dtype=torch.int32)
    row_of = torch.arange(80) + torch.arange(80) // 7
    holed = torch.arange(row_of[79], dtype=torch.int32)
    holed[row_of[:79]] = row_of[groups].to(torch.int32)
    return with_padding(pykern.PrefixTree(torch.cat([groups, gap, holed + 179])), 3)


# --- trees, sizes, heads ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TREES)
def test_trees(place, name):
    tree = TREES[name]()
    check(tree, inputs_of(tree), place)


@pytest.mark.parametrize("tokens", [1, 15, 17, 63, 64, 65, 127, 128, 129, 193, 257])
def test_borders_of_tiles(place, tokens):
    tree = pykern.PrefixTree.from_groups([tokens], [[]])
    check(tree, inputs_of(tree, heads=2, key_heads=1), place)


@pytest.mark.parametrize(
    ("prefix", "responses"), [(64, [64, 64]), (63, [1, 64, 65]), (129, [63, 0, 2]), (1, [128, 127])]
)
def test_borders_of_nodes(place, prefix, responses):
    tree = pykern.PrefixTree.from_groups([prefix], [responses])
    check(tree, inputs_of(tree, heads=1, key_heads=1), place)


@pytest.mark.parametrize("seed", range(8))
def test_random_trees(place, seed):
    tree = random_tree(200 + seed, nodes=2 + 4 * seed, longest=80)
    check(tree, inputs_of(tree, heads=2, key_heads=1, dtype=(BF16, F16)[seed % 2], seed=seed), place)


SIZES = [
    *((size, size, BF16) for size in (1, 8, 24, 32, 40, 64, 72, 80, 96, 128, 200, 256)),
    *(
        (size, value_size, BF16)
        for size, value_size in ((192, 128), (16, 64), (64, 8), (100, 36), (40, 250), (136, 120))
    ),
    *((size, value_size, F16) for size, value_size in ((32, 32), (64, 64), (40, 24), (7, 33))),
]


@pytest.mark.parametrize(("size", "value_size", "dtype"), SIZES)
def test_head_sizes(place, size, value_size, dtype):
    tree = pykern.PrefixTree.from_groups([66], [[5, 0, 22]])
    check(tree, inputs_of(tree, 2, 1, size, value_size, dtype), place)


@pytest.mark.parametrize("size", [96, 128, 192, 256])
def test_large_head_sizes_in_float16(place, size):
    tree = pykern.PrefixTree.from_groups([75], [[20, 0, 50]])
    inputs = inputs_of(tree, 2, 1, size, 128 if size == 192 else size, F16)
    if place.type == "cpu":
        with pytest.raises(RuntimeError, match="the emulator has float16 for head sizes of at most 64"):
            forward(tree, *inputs)
    else:
        check(tree, inputs, place)


@pytest.mark.parametrize(
    ("heads", "key_heads"), [(1, 1), (2, 1), (3, 1), (4, 1), (6, 1), (8, 1), (16, 1), (5, 5), (12, 2), (14, 2), (32, 1)]
)
def test_groups_of_heads(place, heads, key_heads):
    tree = pykern.PrefixTree.from_groups([25], [[9, 20]])
    q, k, v = inputs_of(tree, heads, key_heads, 16)
    sinks, slopes = torch.randn(heads), torch.rand(heads) / 8
    check(tree, (q, k, v), place, sinks=sinks, alibi_slopes=slopes)


# --- options ----------------------------------------------------------------------------------------


def options_of(heads):
    return {
        "scale": {"scale": 0.37},
        "negative scale": {"scale": -0.5},
        "no scale": {"scale": 0.0},
        "window of 1": {"window": 1},
        "window": {"window": 33},
        "window of all": {"window": 2**31 - 1},
        "softcap": {"softcap": 1.5},
        "slopes": {"alibi_slopes": torch.tensor([0.5, 0.0, -0.01, 2.0])[:heads]},
        "sinks": {"sinks": torch.tensor([3.0, -2.0, 0.0, -100.0])[:heads]},
        "sinks of infinity": {"sinks": torch.tensor([-torch.inf] * heads)},
        "softcap of a negative scale": {"softcap": 20.0, "scale": -1.0},
        "window and slopes": {"window": 40, "alibi_slopes": torch.tensor([0.1, 0.02, 1.0, 0.0])[:heads]},
        "all": {
            "scale": 0.4,
            "window": 50,
            "softcap": 5.0,
            "sinks": torch.tensor([1.0, -1.0, 0.5, 2.0])[:heads],
            "alibi_slopes": torch.tensor([0.1, 0.02, 0.3, 0.0])[:heads],
        },
    }


OPTIONS = list(options_of(1))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(place, name):
    tree = pykern.PrefixTree.from_groups([70, 10], [[30, 0, 65], [40]])
    check(tree, inputs_of(tree, 2, 1), place, **options_of(2)[name])


@pytest.mark.parametrize("name", ["softcap", "all"])
def test_options_on_a_large_head(place, name):
    tree = pykern.PrefixTree.from_groups([70], [[30, 66]])
    check(tree, inputs_of(tree, size=128), place, **options_of(4)[name])


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_logits(place, softcap):
    tree = TREES["groups"]()
    q, k, v = inputs_of(tree, 2, 1)
    check(tree, (q * 100, k, v), place, softcap=softcap)


@FOR_ONE_ARCHITECTURE
def test_long_stretches_that_no_query_sees(place):
    """More tiles of keys than are looked at together, none of which but a query's own it sees."""
    tokens = 128 * 128 + 130
    ends = torch.arange(1, tokens + 1, dtype=torch.int32)
    ends[:3] = tokens
    position = torch.full((tokens,), 3, dtype=torch.int32)
    position[:3] = torch.arange(3)
    tree = pykern.PrefixTree(ends).to(place)
    assert torch.equal(tree.position.cpu(), position)
    q, k, v = inputs_of(tree.to("cpu"), 1, 1, 16, 8, F16)
    with one_order(place):
        out, lse, _ = forward(tree, q, k, v, scale=0.5, window=1)
    logits = 0.5 * (q.double() * k.double()).sum(dim=2)
    assert torch.equal(out, v)
    assert_accurate(lse, logits, units=4.0)
    with one_order(place):
        out, lse, _ = forward(tree, q, k, v, scale=0.5)
    rows = torch.tensor([3, 70, 8191, 8192, 16383, 16384, 16500])
    logits = torch.cat([torch.einsum("td,kd->tk", q[rows, 0].double(), k[:3, 0].double()) / 2, logits[rows]], dim=1)
    assert_accurate(lse[rows], logits.logsumexp(dim=1, keepdim=True), units=4.0)
    values = torch.cat([v[:3, 0].expand(len(rows), 3, 8), v[rows]], dim=1).double()
    assert_accurate(out[rows, 0], (logits.softmax(dim=1)[..., None] * values).sum(dim=1))


def test_max_logits_are_asked_for(place):
    tree = TREES["short group"]().to(place)
    q, k, v = (x.to(place) for x in inputs_of(tree.to("cpu")))
    arguments = (q, k, v, *tree.tensors, None, None, 0.3, 0, 0.0)
    op = torch.ops.pykern.prefix_attention_forward.default
    without, given = op(*arguments, False, False), op(*arguments, True, False)
    assert without[2].shape == (0,) and given[2].shape == (4,)
    assert all(torch.equal(a, b) for a, b in zip(without[:2], given[:2], strict=True))


@pytest.mark.parametrize("tokens", [40, 150])
def test_largest_logit_is_negative(place, tokens):
    """Rows beyond the last token are zeros, whose logits would be larger."""
    tree = pykern.PrefixTree.from_groups([tokens], [[]])
    q, k, v = inputs_of(tree)
    q, k = -q.abs() - 1, k.abs() + 1
    for softcap in (None, 20.0):
        *_, max_logits = check(tree, (q, k, v), place, softcap=softcap)
        assert (max_logits < 0).all()


# --- what must not be read --------------------------------------------------------------------------


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("options", ["scale", "all"])
@pytest.mark.parametrize(("size", "dtype"), [(64, F16), (128, BF16)])
def test_padding_is_not_read(place, size, dtype, options, invariant):
    tree = padding_between()
    padding = tree.subtree_end == torch.arange(tree.num_tokens, dtype=torch.int32)
    nothing = ~reference.visibility(tree.subtree_end).any(dim=1)
    assert 0 < nothing.sum() < padding.sum()
    q, k, v = inputs_of(tree, 2, 1, size, dtype=dtype)
    clean = check(tree, (q, k, v), place, invariant, **options_of(2)[options])
    q[nothing] = k[padding] = v[padding] = float("nan")
    out, lse, max_logits = forward(tree.to(place), q, k, v, invariant=invariant, **options_of(2)[options])
    assert (out[nothing] == 0).all() and (lse[nothing] == float("-inf")).all()
    for got, want in zip((out, lse, max_logits), clean, strict=True):
        assert torch.equal(got, want)


def test_rows_that_see_nothing_beside_rows_that_do(place):
    """Thresholds that are no tree's: a row may see nothing though its key is seen, and the reverse."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.arange(200)
    ends = torch.where(torch.rand(200, generator=generator) < 0.2, rows + 6, rows).clamp(max=200).to(torch.int32)
    q, k, v = inputs_of(pykern.PrefixTree.from_groups([200], [[]]), 2, 1)
    position = rows.to(torch.int32)
    bounds, order = reference.tree_tiles(ends, position)
    exact = reference.prefix_attention(*(x.double() for x in (q, k, v)), ends, position)
    baseline = reference.prefix_attention(q, k, v, ends, position)
    assert (exact[1] == float("-inf")).any()
    actual = torch.ops.pykern.prefix_attention_forward.default(
        *(x.to(place) for x in (q, k, v, ends, position, bounds, order)), None, None, 32**-0.5, 0, 0.0, True, False
    )
    for got, want, other in zip(actual, exact, baseline, strict=True):
        assert_accurate(got, want, other)


# --- layouts, repeats -------------------------------------------------------------------------------

LAYOUTS = {
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "size not last": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every second": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "part of a wider tensor": lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
    "unaligned": lambda x: torch.cat([x[:, :, :1], x], dim=2)[:, :, 1:],
    "shared heads": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
}


@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout, size):
    tree = TREES["short group"]().to(place)
    inputs = [LAYOUTS[layout](x.to(place)) for x in inputs_of(tree.to("cpu"), size=size)]
    assert not all(x.is_contiguous() for x in inputs)
    want = forward(tree, *(x.contiguous() for x in inputs))
    assert all(torch.equal(a, b) for a, b in zip(forward(tree, *inputs), want, strict=True))


def test_repeats_bit_for_bit(place):
    tree = random_tree(11, 30, 40).to(place)
    inputs = inputs_of(tree.to("cpu"), 8, 2, 64)
    first = forward(tree, *inputs, softcap=10.0)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(forward(tree, *inputs, softcap=10.0), first, strict=True))


@pytest.mark.parametrize("invariant", [False, True])
def test_no_tokens(place, invariant):
    tree = pykern.PrefixTree.from_groups([], []).to(place)
    out, lse, max_logits = forward(tree, *inputs_of(tree.to("cpu")), invariant=invariant)
    assert out.shape == (0, 4, 32) and lse.shape == (0, 4)
    assert (max_logits == float("-inf")).all()


def test_other_dtypes_are_refused(place):
    tree = TREES["short group"]().to(place)
    with pytest.raises(RuntimeError, match="q: expected bfloat16 or float16 on a GPU"):
        forward(tree, *inputs_of(tree.to("cpu"), dtype=torch.float32))


# --- the order-invariant mode -----------------------------------------------------------------------


def assert_packed_equals_alone(tree, inputs, place, **options):
    """Every sequence of the tree, packed and alone, in the order-invariant mode."""
    packed = check(tree, inputs, place, invariant=True, **options)
    for rows in tree.sequence_rows.split(tree.cu_seqlens.diff().tolist()):
        if len(rows) == 0:
            continue
        own = pykern.PrefixTree.from_groups([len(rows)], [[]])
        alone = forward(own.to(place), *(x[rows] for x in inputs), invariant=True, **options)
        assert torch.equal(alone[0], packed[0][rows])
        assert torch.equal(alone[1], packed[1][rows])


INVARIANT_TREES = {
    **{name: TREES[name] for name in ("one token", "group", "short group", "groups", "chain of levels", "padded")},
    **{f"random {seed}": lambda seed=seed: random_tree(300 + seed, 9, 70) for seed in range(3)},
    "long path": lambda: pykern.PrefixTree.from_parents([37, 50, 3, 90, 1, 60, 20], [-1, 0, 1, 2, 3, 4, 2]),
    "all padding": TREES["all padding"],
}


@FOR_ALL_ARCHITECTURES
@pytest.mark.parametrize("name", INVARIANT_TREES)
def test_packed_equals_alone(place, name):
    tree = INVARIANT_TREES[name]()
    assert_packed_equals_alone(tree, inputs_of(tree, 2, 1), place)


@FOR_ALL_ARCHITECTURES
@pytest.mark.parametrize("name", ["negative scale", "window", "softcap", "slopes", "sinks", "all"])
def test_packed_equals_alone_with_options(place, name):
    tree = pykern.PrefixTree.from_groups([45], [[20, 3, 0, 50]])
    assert_packed_equals_alone(tree, inputs_of(tree, size=16), place, **options_of(4)[name])


@FOR_ALL_ARCHITECTURES
@pytest.mark.parametrize(
    ("size", "value_size", "dtype"),
    [(64, 64, F16), (96, 80, BF16), (128, 128, BF16), (192, 128, BF16), (256, 256, BF16)],
)
def test_packed_equals_alone_for_head_sizes(place, size, value_size, dtype):
    tree = pykern.PrefixTree.from_groups([70], [[10, 33]])
    assert_packed_equals_alone(tree, inputs_of(tree, 3, 1, size, value_size, dtype), place)


@FOR_ALL_ARCHITECTURES
def test_every_token_branches(place):
    """Paths of seven tokens, none of whose rows are neighbours."""
    tree = TREES["every token branches"]()
    check(tree, inputs_of(tree, 2, 1), place, invariant=True)


@FOR_ALL_ARCHITECTURES
def test_order_of_siblings_changes_no_bit(place):
    """The same sequences in another order share tiles with other rows."""
    lengths, first = [30, 41, 7, 64], 50
    tree = pykern.PrefixTree.from_groups([first], [lengths])
    inputs = inputs_of(tree, 4, 2)
    offsets = [first + sum(lengths[:i]) for i in range(len(lengths))]
    want = forward(tree.to(place), *inputs, invariant=True)
    for order in list(itertools.permutations(range(4)))[7::9]:
        rows = torch.cat([torch.arange(first), *(torch.arange(offsets[i], offsets[i] + lengths[i]) for i in order)])
        other = pykern.PrefixTree.from_groups([first], [[lengths[i] for i in order]])
        got = forward(other.to(place), *(x[rows] for x in inputs), invariant=True)
        assert torch.equal(got[0], want[0][rows]) and torch.equal(got[1], want[1][rows])
