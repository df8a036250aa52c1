"""SortedSequences: the order of token ids of any width, common prefixes of any length, parts, and their rows."""

import itertools
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pykern import PrefixTree
from pykern.attention.host import host_vectors
from pykern.attention.trie import SortedSequences
from tests.attention.rollouts import CHECKED, TOKENS


def sort(sequences):
    tokens, lengths = host_vectors(sequences, "sequences")
    return SortedSequences.of(tokens, np.cumsum(lengths) - lengths, lengths)


def shared_by_hand(sequences):
    return [0, *(len(os.path.commonprefix(pair)) for pair in itertools.pairwise(sequences))]


WIDTHS = {
    "16 bits": [-3, 0, 255, 256, 65530],
    "32 bits": [0, 255, 256, 65535, 65536, 2**32 - 1],
    "64 bits": [-(2**63), -(2**40), -1, 0, 1, 2**32, 2**63 - 1],
}


@pytest.mark.parametrize("name", WIDTHS)
def test_order_is_that_of_the_ids(name):
    generator = random.Random(1)
    sequences = [[generator.choice(WIDTHS[name]) for _ in range(generator.randrange(5))] for _ in range(200)]
    ordered = sort(sequences)
    expected = sorted(range(200), key=sequences.__getitem__)
    assert ordered.index.tolist() == expected
    assert ordered.shared.tolist()[1:] == shared_by_hand([sequences[index] for index in expected])[1:]


@pytest.mark.parametrize("ends", ["in others", "alone"])
def test_common_prefixes_of_any_length(ends):
    """Around the sizes in which tokens are compared."""
    head = list(range(2000))
    stops = [*range(5), *range(62, 67), *range(318, 323), *range(1341, 1347), 2000]
    sequences = [head[:stop] + ([-1] if ends == "alone" else []) for stop in stops]
    ordered = sort(sequences)
    by_hand = shared_by_hand([sequences[index] for index in ordered.index])
    assert ordered.shared.tolist() == by_hand
    assert max(by_hand) > 1000
    tree, tokens = PrefixTree.from_sequences(sequences)
    assert tree.num_tokens == 2000 + (len(stops) if ends == "alone" else 0)
    unpacked = tokens[tree.sequence_rows].split(tree.cu_seqlens.diff().tolist())
    assert [part.tolist() for part in unpacked] == sequences


@CHECKED
@given(st.lists(TOKENS, max_size=12), st.data())
def test_parts_are_sorted_too(sequences, data):
    """A part's trie is that of its sequences alone, though their tokens are not looked at again."""
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(sequences))))) if sequences else [])
    ordered = sort(sequences)
    part = ordered.part(np.flatnonzero(np.isin(ordered.index, chosen)))
    alone = sort([sequences[number] for number in chosen])
    assert part.index.tolist() == [chosen[index] for index in alone.index]
    assert part.shared.tolist() == alone.shared.tolist()
    rows, expected = part.rows(), alone.rows()
    for name in ("subtree_end", "position", "tokens", "last_rows", "sequence_rows"):
        assert np.array_equal(getattr(rows, name), getattr(expected, name)), name


@CHECKED
@given(st.lists(TOKENS, max_size=12))
def test_rows_make_the_tree_that_its_tensors_make(sequences):
    tree, _ = PrefixTree.from_sequences(sequences)
    again = PrefixTree(tree.subtree_end)
    assert torch.equal(again.position, tree.position)
    # The maps that come with the trie are those that a tree works out from its last rows.
    fresh = PrefixTree._trusted(tree.subtree_end.numpy(), tree.position.numpy(), tree._last_rows)
    assert torch.equal(fresh.sequence_rows, tree.sequence_rows)
    assert torch.equal(fresh.cu_seqlens, tree.cu_seqlens)
