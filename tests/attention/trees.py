"""Trees that the attention tests share, and what they mean by brute force."""

import random

import torch
from torch import Tensor

import pykern


def random_nodes(seed: int, nodes: int, longest: int) -> tuple[list[int], list[int]]:
    """Lengths and parents of a random forest, zero-length nodes among them, in no particular order."""
    generator = random.Random(seed)
    lengths = [generator.choice([0, 1, generator.randrange(longest + 1)]) for _ in range(nodes)]
    parents = [generator.choice([-1, *range(node), *range(node)]) if node else -1 for node in range(nodes)]
    names = list(range(nodes))
    generator.shuffle(names)
    shuffled_lengths, shuffled_parents = [0] * nodes, [-1] * nodes
    for node, name in enumerate(names):
        shuffled_lengths[name] = lengths[node]
        shuffled_parents[name] = names[parents[node]] if parents[node] >= 0 else -1
    return shuffled_lengths, shuffled_parents


def random_tree(seed: int, nodes: int = 12, longest: int = 60) -> pykern.PrefixTree:
    return pykern.PrefixTree.from_parents(*random_nodes(seed, nodes, longest))


def with_padding(tree: pykern.PrefixTree, count: int) -> pykern.PrefixTree:
    """The tree with padding tokens behind it."""
    tail = torch.arange(tree.num_tokens, tree.num_tokens + count, dtype=torch.int32)
    return pykern.PrefixTree(torch.cat([tree.subtree_end, tail]))


TREES = {
    "one token": lambda: pykern.PrefixTree.from_groups([1], [[]]),
    "causal": lambda: pykern.PrefixTree.from_groups([150], [[]]),
    "documents": lambda: pykern.PrefixTree.from_groups([33, 64, 1, 100], [[], [], [], []]),
    "group": lambda: pykern.PrefixTree.from_groups([130], [[40, 64, 1, 0, 77]]),
    "short group": lambda: pykern.PrefixTree.from_groups([9], [[3, 5, 2, 0, 7, 1, 1]]),
    "groups": lambda: pykern.PrefixTree.from_groups([65, 0, 20], [[10, 30], [17, 50], [3, 3, 90]]),
    "aligned": lambda: pykern.PrefixTree.from_groups([128], [[64, 64, 128]]),
    "chain of levels": lambda: pykern.PrefixTree.from_parents([70, 30, 40, 50, 20], [-1, 0, 1, 1, 0]),
    "padded": lambda: with_padding(pykern.PrefixTree.from_groups([70], [[20, 25]]), 90),
    "all padding": lambda: pykern.PrefixTree(torch.arange(70, dtype=torch.int32)),
    "every token branches": lambda: pykern.PrefixTree.from_parents([1] * 120, [-1] + [i // 2 for i in range(119)]),
    "random": lambda: random_tree(5, 20, 60),
}


def make_inputs(
    tree: pykern.PrefixTree, heads: int, key_heads: int, size: int, value_size: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int, size: int) -> Tensor:
        return torch.randn(tree.num_tokens, heads, size, generator=generator, dtype=torch.float64).to(dtype)

    return randn(heads, size), randn(key_heads, size), randn(key_heads, value_size), randn(heads, value_size)
