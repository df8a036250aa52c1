"""Bounds of subtree_end over tiles of keys, and what they tell about a pair of tiles."""

import pytest
import torch

import pykern
from pykern import reference
from pykern.attention.tiles import FULL, PARTIAL, SKIP, classify_tile_pair, tile_bounds
from pykern.reference.attention import visibility
from tests.attention.trees import TREES, random_tree, with_padding
from tests.support import check_op, compile_whole


@pytest.mark.parametrize("tile_size", [1, 3, 32, 100, 128, 5000])
def test_bounds_are_those_of_the_reference(device, tile_size):
    for name, make in TREES.items():
        tree = make().to(device)
        bounds = tree.tiles(tile_size)
        assert bounds.dtype == torch.int32 and bounds.is_contiguous()
        assert torch.equal(bounds, reference.attention.tile_bounds(tree.subtree_end, tile_size)), name


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 127, 128, 129, 515, 1031])
@pytest.mark.parametrize("tile_size", [4, 31, 128, 132, 512])
def test_any_values_at_any_border(device, tokens, tile_size):
    """Bare tensors are not checked, so the bounds hold for any values; a view may begin anywhere."""
    generator = torch.Generator().manual_seed(tokens)
    extremes = torch.tensor([-(2**31), -1, 0, 2**31 - 1])
    values = torch.randint(0, 2 * tokens + 2, (tokens,), generator=generator)
    rare = torch.randint(0, 40, (tokens,), generator=generator)
    values = torch.where(rare < 4, extremes[rare.clamp(max=3)], values).to(torch.int32)
    for lead in (0, 1):
        ends = torch.cat([torch.zeros(lead, dtype=torch.int32), values]).to(device)[lead:]
        want = reference.attention.tile_bounds(ends, tile_size)
        assert torch.equal(tile_bounds(ends, tile_size), want)
    spread = torch.stack([values, values], dim=1).to(device)[:, 0]
    assert torch.equal(tile_bounds(spread, tile_size), want)


def test_huge_tile_is_one_tile(device):
    ends = TREES["group"]().to(device).subtree_end
    assert tile_bounds(ends, 2**62).tolist() == [[ends.min().item(), ends.max().item()]]


@pytest.mark.parametrize(
    ("key_tile", "query_tile"), [(7, 1), (1, 16), (5, 7), (16, 16), (16, 64), (64, 16), (40, 5), (40, 64)]
)
def test_classes_against_the_dense_mask(key_tile, query_tile):
    trees = {**{name: make() for name, make in TREES.items()}, **{seed: random_tree(seed) for seed in range(8)}}
    trees["padding inside"] = pykern.PrefixTree(torch.tensor([40, *range(1, 20), *[40] * 20], dtype=torch.int32))
    trees["padded"] = with_padding(random_tree(3), 50)
    for name, tree in trees.items():
        tokens = tree.num_tokens
        visible = visibility(tree.subtree_end)
        for number, (smallest, largest) in enumerate(tree.tiles(key_tile).tolist()):
            keys = range(number * key_tile, min((number + 1) * key_tile, tokens))
            for first in range(0, tokens, query_tile):
                queries = range(first, min(first + query_tile, tokens))
                pairs = visible[queries.start : queries.stop, keys.start : keys.stop]
                got = classify_tile_pair(smallest, largest, keys.start, keys.stop, queries.start, queries.stop)
                assert (got == FULL) == bool(pairs.all()), name
                if got == SKIP or keys.stop <= queries.stop:
                    assert (got == SKIP) == (not pairs.any()), name


def test_classes_of_tensors_are_those_of_integers():
    tree, tile = TREES["groups"](), 16
    bounds = tree.tiles(tile).long()
    first = torch.arange(len(bounds)) * tile
    stop = (first + tile).clamp(max=tree.num_tokens)
    got = classify_tile_pair(bounds[:, 0], bounds[:, 1], first, stop, first[:, None], stop[:, None])
    assert got.dtype == torch.int8 and got.shape == (len(bounds), len(bounds))
    assert set(got.unique().tolist()) == {SKIP, PARTIAL, FULL}
    for query in range(len(bounds)):
        for key in range(len(bounds)):
            numbers = (*bounds[key].tolist(), first[key].item(), stop[key].item())
            assert got[query, key] == classify_tile_pair(*numbers, first[query].item(), stop[query].item())


def test_made_once_for_each_size(device):
    tree = TREES["group"]().to(device)
    bounds = tree.tiles(64)
    assert tree.tiles(64) is bounds
    assert tree.tiles(32) is not bounds
    assert tree.to("meta").tiles(64).device.type == "meta"


def test_made_in_inference_mode_and_saved_for_a_backward(device):
    tree = TREES["group"]().to(device)
    with torch.inference_mode():
        tree.tiles(64)
    assert not tree.tiles(64).is_inference()


def test_opcheck(device):
    check_op(torch.ops.pykern.prefix_attention_tiles.default, (TREES["group"]().to(device).subtree_end, 64))


def test_compiles_whole(device):
    tree = TREES["group"]().to(device)
    assert torch.equal(compile_whole(lambda tree: tree.tiles(64) + 1)(tree), tree.tiles(64) + 1)


@pytest.mark.parametrize(
    ("ends", "tile_size", "error", "message"),
    [
        (torch.zeros(3), 64, TypeError, "subtree_end: expected an int32 tensor, got torch.float32"),
        ([1, 2], 64, TypeError, "subtree_end: expected an int32 tensor, got list"),
        (torch.zeros(3, 2, dtype=torch.int32), 64, ValueError, "subtree_end: expected one dimension"),
        (torch.zeros(3, dtype=torch.int32), 0, ValueError, "tile_size: expected at least 1, got 0"),
        (torch.zeros(3, dtype=torch.int32), 1.5, TypeError, "tile_size: expected an integer, got float"),
    ],
)
def test_refused(ends, tile_size, error, message):
    with pytest.raises(error, match=message):
        tile_bounds(ends, tile_size)
