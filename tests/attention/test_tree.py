"""PrefixTree: constructors, maps back to the sequences, checks."""

import random

import pytest
import torch

from pykern import PrefixTree
from pykern.reference.attention import visibility
from tests.attention.trees import TREES, random_nodes, random_tree, with_padding


def ancestors(parents, node):
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def test_from_groups_values():
    tree = PrefixTree.from_groups([2, 1], [[2, 0, 1], [1]])
    assert tree.subtree_end.tolist() == [5, 5, 4, 4, 5, 7, 7]
    assert tree.position.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert tree.subtree_end.dtype == tree.position.dtype == torch.int32
    assert tree.num_tokens == 7
    assert tree.num_sequences == 4
    assert tree.cu_seqlens.tolist() == [0, 4, 6, 9, 11]
    assert tree.sequence_rows.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 4, 5, 6]
    assert tree.cu_seqlens.dtype == torch.int32 and tree.sequence_rows.dtype == torch.int64


def test_prompt_without_responses_is_a_sequence():
    tree = PrefixTree.from_groups([3, 2], [[], [1]])
    assert tree.cu_seqlens.tolist() == [0, 3, 6]


@pytest.mark.parametrize("seed", range(12))
def test_from_parents_is_the_forest(seed):
    lengths, parents = random_nodes(seed, 15, 6)
    tree = PrefixTree.from_parents(lengths, parents)
    assert tree.num_tokens == sum(lengths)
    # Sequences are the leaves, so their rows say which rows belong to which node.
    leaves = [node for node in range(len(parents)) if node not in parents]
    rows, bounds = tree.sequence_rows.tolist(), tree.cu_seqlens.tolist()
    node_rows = {}
    expected = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.bool)
    for leaf, begin, end in zip(leaves, bounds, bounds[1:], strict=False):
        path = rows[begin:end]
        assert len(path) == sum(lengths[node] for node in ancestors(parents, leaf))
        assert tree.position[path].tolist() == list(range(len(path)))
        at = 0
        for node in ancestors(parents, leaf):
            own = path[at : at + lengths[node]]
            assert node_rows.setdefault(node, own) == own
            at += lengths[node]
        for depth, row in enumerate(path):
            expected[row, path[: depth + 1]] = True
    assert len(bounds) == len(leaves) + 1
    assert torch.equal(visibility(tree.subtree_end), expected)


@pytest.mark.parametrize("name", TREES)
def test_tensors_alone_make_the_same_tree(name):
    tree = TREES[name]()
    again = PrefixTree(tree.subtree_end)
    real = tree.subtree_end > torch.arange(tree.num_tokens)
    assert torch.equal(again.position[real], tree.position[real])
    assert PrefixTree(tree.subtree_end, tree.position).num_tokens == tree.num_tokens
    # Its sequences are the paths to the tokens without descendants.
    visible = visibility(tree.subtree_end)
    leaves = torch.nonzero(tree.subtree_end == torch.arange(1, tree.num_tokens + 1))[:, 0].tolist()
    paths = [torch.nonzero(visible[leaf])[:, 0] for leaf in leaves]
    assert torch.equal(again.sequence_rows, torch.cat([*paths, torch.zeros(0, dtype=torch.int64)]))
    assert again.num_sequences == len(leaves)


@pytest.mark.parametrize("seed", range(12))
def test_from_sequences_is_the_trie(seed):
    generator = random.Random(seed)
    lengths = [generator.randrange(7) for _ in range(generator.randrange(25))]
    sequences = [[generator.randrange(-1, 2) for _ in range(length)] for length in lengths]
    tree, tokens = PrefixTree.from_sequences(sequences)
    prefixes = {tuple(sequence[:stop]) for sequence in sequences for stop in range(1, len(sequence) + 1)}
    assert tree.num_tokens == len(prefixes) == len(tokens)
    assert tree.num_sequences == len(sequences)
    unpacked = tokens[tree.sequence_rows].split(tree.cu_seqlens.diff().tolist())
    assert [part.tolist() for part in unpacked] == sequences
    # Every row sees exactly its own prefix.
    visible = visibility(tree.subtree_end)
    seen = {tuple(tokens[visible[row]].tolist()) for row in range(tree.num_tokens)}
    assert seen == prefixes
    assert torch.equal(tree.position.long() + 1, visible.sum(dim=1))
    assert torch.equal(PrefixTree(tree.subtree_end).position, tree.position)


def test_from_sequences_of_long_tensors():
    shared = torch.arange(5000)
    tree, tokens = PrefixTree.from_sequences([torch.cat([shared, torch.tensor([tail])]) for tail in (3, 1, 3, -2)])
    assert tree.num_tokens == 5003
    assert tokens[-3:].tolist() == [-2, 1, 3]
    assert tree.cu_seqlens.diff().tolist() == [5001] * 4


def test_empty_trees():
    for tree in (
        PrefixTree.from_groups([], []),
        PrefixTree.from_parents([], []),
        PrefixTree.from_sequences([])[0],
        PrefixTree(torch.zeros(0, dtype=torch.int32)),
    ):
        assert tree.num_tokens == tree.num_sequences == tree.visible_pairs == 0
        assert tree.cu_seqlens.tolist() == [0]
        assert tree.sequence_rows.shape == (0,)
    assert PrefixTree.from_sequences([[], []])[0].cu_seqlens.tolist() == [0, 0, 0]
    assert PrefixTree.from_groups([0], [[0, 2]]).cu_seqlens.tolist() == [0, 0, 2]


@pytest.mark.parametrize("name", TREES)
def test_flops_count_visible_pairs(name):
    tree = TREES[name]()
    pairs = int(visibility(tree.subtree_end).sum())
    with torch.device("meta"):  # whatever torch's default device
        assert tree.visible_pairs == pairs
    assert tree.flops(4, 10) == 4 * pairs * 4 * 10
    assert tree.flops(4, 10, 6) == 2 * pairs * 4 * 16
    assert tree.flops(4, 10, backward=True) == 14 * pairs * 4 * 10


def test_to_moves_the_tensors():
    tree = random_tree(1)
    assert tree.to("cpu") is tree
    moved = tree.to("meta")
    assert moved.subtree_end.device.type == moved.position.device.type == "meta"


def test_is_frozen():
    with pytest.raises(AttributeError):
        random_tree(1).position = None


def test_made_in_inference_mode_it_serves_a_backward():
    with torch.inference_mode():
        given = PrefixTree(int32([3, 2, 3]))
        grown = PrefixTree.from_groups([1], [[1, 1]])
        grown.sequence_rows  # noqa: B018 made when first asked for
    leaf = torch.ones(3, requires_grad=True)
    leaf[grown.sequence_rows].square().sum().backward()
    assert leaf.grad.tolist() == [4, 2, 2]
    assert not any(tensor.is_inference() for tensor in (*given.tensors, *grown.tensors, grown.cu_seqlens))


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PrefixTree([1, 2]), TypeError, "subtree_end: expected an int32 tensor, got list"),
        (lambda: PrefixTree(torch.tensor([2, 2])), TypeError, "subtree_end: expected dtype torch.int32"),
        (lambda: PrefixTree(int32([[2, 2]])), ValueError, "subtree_end: expected one dimension"),
        (lambda: PrefixTree(int32([3, 2])), ValueError, "for token 0, got 3"),
        (lambda: PrefixTree(int32([2, 0])), ValueError, "for token 1, got 0"),
        (lambda: PrefixTree(int32([2, 3, 3])), ValueError, "expected nested subtrees, but that of token 1"),
        (lambda: PrefixTree(int32([5, 3, 3, 6, 5, 6])), ValueError, "that of token 3 ends at 6, beyond 5"),
        (lambda: PrefixTree(int32([2, 2]), int32([0])), ValueError, "position: expected shape"),
        (lambda: PrefixTree(int32([2, 2]), int32([0, 5])), ValueError, "expected 1 ancestors for token 1, got 5"),
        (lambda: PrefixTree(int32([1, 1]), int32([0, -(2**31)])), ValueError, "for padding too, got -2147483648 for"),
        (lambda: PrefixTree.from_groups([1, 2], [[1]]), ValueError, "response_lens: expected a list for each of the 2"),
        (lambda: PrefixTree.from_groups([-1], [[1]]), ValueError, "lengths: expected lengths >= 0, got -1"),
        (lambda: PrefixTree.from_parents([1], [0, 1]), ValueError, "parents: expected one for each of the 1 nodes"),
        (lambda: PrefixTree.from_parents([1, 1], [-1, 2]), ValueError, "parents: expected -1"),
        (lambda: PrefixTree.from_parents([1, 1, 1], [-1, 2, 1]), ValueError, "node 1 is its own ancestor"),
        (lambda: PrefixTree.from_parents([1.5], [-1]), TypeError, "lengths: expected integers"),
        (lambda: PrefixTree.from_sequences([[1], [0.5]]), TypeError, r"sequences\[1\]: expected integers"),
        (lambda: PrefixTree.from_sequences([[[1]]]), ValueError, r"sequences\[0\]: expected one dimension"),
    ],
)
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_padding_inside_a_subtree_is_accepted():
    tree = PrefixTree(int32([5, 1, 5, 3, 5]))
    assert tree.position[[0, 2, 4]].tolist() == [0, 1, 2]
    assert with_padding(random_tree(2), 5).num_tokens == random_tree(2).num_tokens + 5
