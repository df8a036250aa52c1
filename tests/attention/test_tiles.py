"""Bounds of a tree's tiles and the order of its blocks."""

import pytest
import torch

import pykern
from pykern.reference import attention as reference
from pykern.attention.tiles import tree_tiles
from tests.attention.trees import TREES, random_tree
from tests.support import check_op, compile_whole


def check(ends, position):
    want = reference.tree_tiles(ends, position)
    for got, expected in zip(tree_tiles(ends, position), want, strict=True):
        assert got.dtype == torch.int32 and got.is_contiguous()
        assert torch.equal(got, expected)


def test_tiles_are_those_of_the_reference(device):
    trees = {**{name: make() for name, make in TREES.items()}, **{seed: random_tree(seed) for seed in range(4)}}
    for tree in trees.values():
        tree = tree.to(device)
        check(tree.subtree_end, tree.position)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 63, 64, 65, 127, 128, 129, 515, 1031])
def test_any_values_at_any_border(device, tokens):
    """Bare tensors are not checked, so the bounds hold for any values."""
    generator = torch.Generator().manual_seed(tokens)
    extremes = torch.tensor([-(2**31), -1, 0, 2**31 - 1])
    values = torch.randint(0, 2 * tokens + 2, (2, tokens), generator=generator)
    rare = torch.randint(0, 40, (2, tokens), generator=generator)
    values = torch.where(rare < 4, extremes[rare.clamp(max=3)], values).to(torch.int32)
    # A key is seen by existing queries alone.
    values[0].clamp_(max=tokens)
    check(*(row.to(device) for row in values))


def test_order_is_the_longest_first(device):
    tree = pykern.PrefixTree.from_groups([700], [[90] * 5]).to(device)
    queries, keys = tree.order.tolist()
    # The last prompt block sees all prompt tiles; a response's block sees them and its own.
    assert queries[-1] == 0 and set(queries[:3]) <= set(range(5, 9))
    assert keys[:5] == [0, 1, 2, 3, 4]


def test_made_with_the_tree_and_moved_with_it(device):
    tree = TREES["group"]().to(device)
    assert tree.bounds is tree.tensors[2] and tree.order is tree.tensors[3]
    assert all(tensor.device.type == "meta" for tensor in tree.to("meta").tensors)


def test_made_in_inference_mode_and_saved_for_a_backward(device):
    with torch.inference_mode():
        tree = TREES["group"]().to(device)
    assert not any(tensor.is_inference() for tensor in tree.tensors)


def test_opcheck(device):
    tree = TREES["group"]().to(device)
    check_op(torch.ops.pykern.prefix_attention_tiles.default, (tree.subtree_end, tree.position))


def test_compiles_whole(device):
    tree = TREES["group"]().to(device)
    compiled = compile_whole(lambda ends, position: tree_tiles(ends, position)[0] + 1)
    assert torch.equal(compiled(tree.subtree_end, tree.position), tree.bounds + 1)
