"""Rollouts that the tests of packing share, and what a packed batch of them must say."""

import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st

from pykern.attention.rows import invert_rows
from pykern.reference.attention import visibility

CHECKED = settings(max_examples=100, deadline=None, derandomize=True)

# Few tokens and short sequences: prefixes, duplicates and empty sequences come up often.
TOKENS = st.lists(st.integers(-1, 1), max_size=6)


@st.composite
def rollouts(draw):
    sequences = draw(st.lists(TOKENS, max_size=9))
    masks = [[place > 0 and draw(st.booleans()) for place in range(len(sequence))] for sequence in sequences]
    weights = [[draw(st.integers(0, 8)) / 4 for _ in sequence] for sequence in sequences]
    return sequences, masks, weights


def targets_of(sequences, masks):
    """(sequence, column) of every target, sequence after sequence."""
    return [(s, t) for s, mask in enumerate(masks) for t, trained in enumerate(mask) if trained]


def assert_packed(batch, sequences, masks, weights, numbers):
    """Everything that a PackedSequences says about sequences[number] for the numbers it holds."""
    visible = visibility(batch.tree.subtree_end)
    contexts = [tuple(batch.token_ids[row].tolist()) for row in visible]
    held = [sequences[number] for number in numbers]
    assert sorted(contexts) == sorted({tuple(s[: t + 1]) for s in held for t in range(len(s))})
    assert batch.sequence_ids.tolist() == list(numbers)
    assert batch.copies.tolist() == [held.count(sequence) for sequence in held]
    unpacked = batch.token_ids[batch.tree.sequence_rows].split(batch.tree.cu_seqlens.diff().tolist())
    assert [part.tolist() for part in unpacked] == held

    expected = targets_of(held, [masks[number] for number in numbers])
    assert batch.target_sequences.tolist() == [numbers[s] for s, _ in expected]
    assert batch.target_columns.tolist() == [t for _, t in expected]
    counts = [sum(masks[number]) for number in numbers]
    assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(counts)]
    assert batch.weights.tolist() == [weights[numbers[s]][t] for s, t in expected]
    for (s, t), which in zip(expected, batch.target_index.tolist(), strict=True):
        assert contexts[batch.predictor_rows[which]] == tuple(held[s][:t])
        assert batch.targets[which] == held[s][t]

    distinct = {tuple(held[s][: t + 1]) for s, t in expected}
    assert len(batch.targets) == len(batch.predictor_rows) == len(distinct)
    assert batch.multiplicity.tolist() == torch.bincount(batch.target_index, minlength=len(distinct)).tolist()
    sums = torch.zeros(len(distinct)).index_add(0, batch.target_index, batch.weights)
    assert torch.equal(batch.target_weights, sums)
    for order, offsets, rows, source in (
        (batch.predictor_order, batch.predictor_offsets, batch.predictor_rows, batch.tree.num_tokens),
        (batch.target_order, batch.target_offsets, batch.target_index, len(distinct)),
    ):
        for part, whole in zip((order, offsets), invert_rows(rows, source), strict=True):
            assert torch.equal(part, whole)
    for name in ("token_ids", "predictor_rows", "targets", "target_index", "sequence_ids", "copies", "target_columns"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.weights.dtype == batch.target_weights.dtype == torch.float32


def padded(sequences, width, side):
    tokens = torch.full((len(sequences), width), 99)
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        begin = width - len(sequence) if side == "left" else 0
        tokens[row, begin : begin + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, begin : begin + len(sequence)] = 1
    return tokens, mask
