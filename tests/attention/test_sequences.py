"""pack_sequences and join_turns: every target of every rollout, predicted from its own context."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import log_softmax, scaled_dot_product_attention

from pykern import join_turns, pack_sequences
from pykern.attention.host import inverse_of_rows
from pykern.attention.rows import invert_rows
from pykern.reference.attention import visibility
from tests.attention.rollouts import CHECKED, TOKENS, assert_packed, padded, rollouts
from tests.support import assert_accurate


@CHECKED
@given(rollouts())
def test_every_target_is_predicted_from_its_own_context(drawn):
    sequences, masks, weights = drawn
    batch = pack_sequences(sequences, loss_mask=masks, weights=weights)
    assert_packed(batch, sequences, masks, weights, range(len(sequences)))


@CHECKED
@given(st.lists(TOKENS, max_size=8))
def test_by_default_all_but_first_tokens_count_once_each(sequences):
    masks = [[False, *[True] * (len(sequence) - 1)] if sequence else [] for sequence in sequences]
    ones = [[1.0] * len(sequence) for sequence in sequences]
    assert_packed(pack_sequences(sequences), sequences, masks, ones, range(len(sequences)))


@CHECKED
@given(st.lists(st.tuples(TOKENS, st.integers(-1, 1)), max_size=8))
def test_groups_that_share_nothing(drawn):
    sequences, groups = [tokens for tokens, _ in drawn], [group for _, group in drawn]
    batch = pack_sequences(sequences, share_within=torch.tensor(groups, dtype=torch.int64))
    # As if every group had tokens of its own.
    apart = pack_sequences([[token + 10 * group for token in tokens] for tokens, group in drawn])
    assert torch.equal(batch.tree.subtree_end, apart.tree.subtree_end)
    assert torch.equal(batch.tree.sequence_rows, apart.tree.sequence_rows)
    for name in ("predictor_rows", "target_index", "copies", "target_sequences", "target_columns"):
        assert torch.equal(getattr(batch, name), getattr(apart, name)), name
    assert batch.token_ids[batch.tree.sequence_rows].tolist() == list(itertools.chain(*sequences))


def test_a_row_where_rollouts_part_has_several_targets():
    batch = pack_sequences([[5, 6, 1], [5, 6, 2], [5, 6], [5, 6, 1]], weights=[1, 2, 4, 8])
    assert batch.token_ids.tolist() == [5, 6, 1, 2]
    assert batch.predictor_rows.tolist() == [0, 1, 1]
    assert batch.targets.tolist() == [6, 1, 2]
    assert batch.target_index.tolist() == [0, 1, 0, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 5, 7]
    assert batch.multiplicity.tolist() == [4, 2, 1]
    assert batch.target_weights.tolist() == [15, 9, 2]
    assert batch.copies.tolist() == [2, 1, 1, 2]


@pytest.mark.parametrize("make", [list, tuple, torch.tensor, np.array, lambda s: np.array(s, dtype=np.int16)])
def test_lists_arrays_and_tensors_are_one(make):
    sequences, masks = [[1, 2, 3], [1, 2], [7, 8]], [[0, 1, 0], [0, 1], [0, 1]]
    alike = pack_sequences([make(s) for s in sequences], loss_mask=[make(m) for m in masks])
    mixed = pack_sequences([make(sequences[0]), *sequences[1:]], loss_mask=[masks[0], *map(torch.tensor, masks[1:])])
    for packed in (alike, mixed):
        assert packed.token_ids.tolist() == [1, 2, 3, 7, 8]
        assert packed.targets.tolist() == [2, 8] and packed.target_index.tolist() == [0, 0, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_matrices_are_their_tokens(side):
    sequences = [[1, 2, 3], [], [1, 2], [4], [1, 2, 3, 4, 5]]
    tokens, attention_mask = padded(sequences, 7, side)
    loss_mask = attention_mask.float()
    loss_mask[torch.arange(5), attention_mask.argmax(dim=1)] = 0
    weights = torch.rand(5, 7)
    batch = pack_sequences(tokens, attention_mask=attention_mask, loss_mask=loss_mask, weights=weights)
    lists = pack_sequences(sequences)
    for name in ("token_ids", "predictor_rows", "targets", "target_index", "cu_seqlens", "copies", "target_sequences"):
        assert torch.equal(getattr(batch, name), getattr(lists, name)), name
    assert batch.given_shape == (5, 7) and lists.given_shape == (5, 5)
    # What a padded matrix holds at the targets, and back.
    assert torch.equal(batch.take(tokens), batch.targets[batch.target_index])
    assert torch.equal(batch.take(weights), batch.weights)
    assert torch.equal(batch.scatter(batch.weights, fill=-1.0), weights.masked_fill(loss_mask == 0, -1.0))
    assert torch.equal(pack_sequences(tokens.numpy(), attention_mask=attention_mask.bool()).targets, lists.targets)


def test_matrices_of_responses_only():
    prompts, responses = torch.tensor([[9, 1], [2, 3]]), torch.tensor([[4, 5, 0], [6, 0, 0]])
    response_mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    attention_mask = torch.cat([torch.tensor([[0, 1], [1, 1]]), response_mask], dim=1)
    loss_mask = torch.cat([torch.zeros(2, 2), response_mask], dim=1)
    tokens = torch.cat([prompts, responses], dim=1)
    batch = pack_sequences(tokens, attention_mask=attention_mask, loss_mask=loss_mask)
    assert batch.take(responses, first_column=2).tolist() == [4, 5, 6]
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    back = batch.scatter(values, first_column=2)
    assert back.tolist() == [[1, 2, 0], [3, 0, 0]]
    (grad,) = torch.autograd.grad(back, values, torch.arange(6.0).view(2, 3))
    assert grad.tolist() == [0, 1, 3]
    assert batch.scatter(values, first_column=1, width=3).tolist() == [[0, 1, 2], [0, 3, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_expand_sums_its_gradient_in_order(device, dtype):
    generator = random.Random(3)
    sequences = [[generator.randrange(2) for _ in range(generator.randrange(1, 12))] for _ in range(80)]
    batch = pack_sequences(sequences).to(device)
    assert len(batch.target_index) > 2 * len(batch.targets) > 100
    values = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
    values.requires_grad_()
    out = batch.expand(values)
    assert torch.equal(out, values[batch.target_index])
    grad_out = torch.randn(len(out), generator=torch.Generator().manual_seed(1), dtype=dtype)
    grads = [torch.autograd.grad(batch.expand(values), values, grad_out.to(device))[0] for _ in range(3)]
    sums = torch.zeros(len(values), dtype=dtype)
    for n, which in enumerate(batch.target_index.tolist()):
        sums[which] += grad_out[n]
    for grad in grads:
        assert torch.equal(grad.cpu(), sums)


def test_packed_in_inference_mode(device):
    """As a trainer does that packs where it has sampled."""
    with torch.inference_mode():
        batch = pack_sequences([[1, 2, 3], [1, 2, 4]]).to(device)
    hidden = torch.ones(4, 3, device=device, requires_grad=True)
    batch.expand(batch.gather(hidden)[:, 0] * batch.target_weights).sum().backward()
    assert hidden.grad[:, 0].tolist() == [4, 2, 0, 0]
    assert not any(t.is_inference() for t in (batch.token_ids, batch.tree.sequence_rows, *batch.tree.tensors))


def test_the_loss_is_that_of_the_rollouts_alone():
    """A one-layer model in float64: log-probabilities, loss and gradients, packed and rollout by rollout."""
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(0.5).requires_grad_()

    embedding, head = parameter(5, 8), parameter(5, 8)
    position = parameter(40, 8)
    # Two groups under a system prompt, a branch inside a response, a side leaf, a rollout that ends early, twins.
    turns = [[0, 1], [2, 3, 4], [1, 1], [0], [4, 2, 2], [3], [2, 0, 1], [1, 4]]
    parents = [-1, 0, 1, 2, 2, 1, 0, 6]
    sequences, masks = join_turns(turns, parents, loss_mask=[0, 0, 1, 0, 1, 1, 0, 1], ends=[3, 4, 5, 2, 7, 4, 7])
    advantages = torch.randn(len(sequences), generator=generator, dtype=torch.float64)

    def logprobs(tokens, tree, batch):
        x = embedding[tokens] + position[tree.position.long()]
        hidden = scaled_dot_product_attention(x, x * 0.7, x + 0.1, attn_mask=visibility(tree.subtree_end))
        return log_softmax(batch.gather(hidden) @ head.T, dim=1).gather(1, batch.targets[:, None])[:, 0]

    def loss(batch):
        each = batch.expand(logprobs(batch.token_ids, batch.tree, batch))
        ratio = torch.exp(each - each.detach() + 0.1)
        own = torch.repeat_interleave(advantages[batch.sequence_ids], batch.cu_seqlens.diff())
        return each, -torch.minimum(ratio * own, ratio.clamp(0.8, 1.05) * own).sum()

    packed_logprobs, packed_loss = loss(pack_sequences(sequences, loss_mask=masks))
    alone = []
    for number, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        batch = pack_sequences([sequence], loss_mask=[mask])
        object.__setattr__(batch, "sequence_ids", torch.tensor([number]))
        alone.append(loss(batch))
    assert_accurate(packed_logprobs, torch.cat([each for each, _ in alone]), units=100)
    total = sum(value for _, value in alone)
    assert_accurate(packed_loss, total, units=100)
    parameters = (embedding, head, position)
    for packed, exact in zip(
        torch.autograd.grad(packed_loss, parameters), torch.autograd.grad(total, parameters), strict=True
    ):
        assert_accurate(packed, exact, units=1000)

    # A weighted sum of log-probabilities needs no more than the distinct targets.
    batch = pack_sequences(sequences, loss_mask=masks, weights=advantages)
    distinct = logprobs(batch.token_ids, batch.tree, batch)
    direct = (distinct * batch.target_weights.double()).sum()
    assert_accurate(direct, (batch.expand(distinct) * batch.weights.double()).sum(), units=1e9)


@pytest.mark.parametrize("seed", range(20))
def test_turns_branch_anywhere(seed):
    generator = random.Random(seed)
    count = generator.randrange(1, 14)
    turns = [[generator.randrange(3) for _ in range(generator.randrange(4))] for _ in range(count)]
    names = list(range(count))
    generator.shuffle(names)
    parents = [-1] * count
    for place in range(1, count):
        parents[names[place]] = generator.choice([-1, *names[:place], *names[:place]])
    ends = None if seed % 2 else [generator.randrange(count) for _ in range(generator.randrange(9))]
    trained = [generator.randrange(2) for _ in turns]
    each = [[generator.randrange(2) for _ in turn] for turn in turns]
    for loss_mask, token_masks in (
        (trained, [[value] * len(turn) for value, turn in zip(trained, turns, strict=True)]),
        (each, each),
    ):
        sequences, masks = join_turns(turns, parents, loss_mask=loss_mask, ends=ends)
        last = [turn for turn in range(count) if turn not in parents] if ends is None else ends
        for turn, sequence, mask in itertools.zip_longest(last, sequences, masks):
            tokens, marks = [], []
            while turn >= 0:
                tokens, marks = turns[turn] + tokens, token_masks[turn] + marks
                turn = parents[turn]
            assert sequence.dtype == torch.int64 and sequence.tolist() == tokens
            assert mask.dtype == torch.bool and mask.tolist() == list(map(bool, marks))


def test_empty_batches():
    for sequences in ([], [[]], [[], []], torch.zeros(0, 4, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        batch = pack_sequences(sequences)
        assert batch.tree.num_tokens == len(batch.targets) == len(batch.target_index) == 0
        assert len(batch.cu_seqlens) == len(sequences) + 1
        assert batch.take(torch.zeros(batch.given_shape)).shape == (0,)
        assert batch.scatter(torch.zeros(0)).shape == batch.given_shape
        assert batch.gather(torch.zeros(0, 3)).shape == (0, 3)
    assert pack_sequences([[3]]).tree.num_tokens == 1
    assert join_turns([], [], loss_mask=[]) == ([], [])


def test_to_moves_every_tensor():
    batch = pack_sequences([[1, 2], [1, 3]])
    moved = batch.to("meta")
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 15
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert moved.tree.position.device.type == "meta"
    assert moved.given_shape == batch.given_shape == (2, 2)


@pytest.mark.parametrize(("count", "source"), [(0, 0), (0, 3), (1, 1), (500, 7), (70000, 65536), (70000, 200000)])
def test_rows_are_inverted_alike_on_the_host(count, source):
    rows = torch.randint(0, max(source, 1), (count,), generator=torch.Generator().manual_seed(0))
    for mine, other in zip(inverse_of_rows(rows.numpy(), source), invert_rows(rows, source), strict=True):
        assert torch.equal(torch.from_numpy(mine), other)


MATRIX = torch.ones(2, 3, dtype=torch.int64)
BATCH = pack_sequences([[1, 2, 3], [1, 2, 4]])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pack_sequences([[1], [0.5]]), TypeError, r"sequences\[1\]: expected integers"),
        (lambda: pack_sequences([[1], [[1]]]), ValueError, r"sequences\[1\]: expected one dimension"),
        (
            lambda: pack_sequences([[1], [[1], [2, 3]]]),
            ValueError,
            r"sequences\[1\]: expected one dimension, got lists",
        ),
        (lambda: pack_sequences([5, [1]]), ValueError, r"sequences\[0\]: expected one dimension"),
        (lambda: pack_sequences([[[1]], [[1]]]), ValueError, r"sequences\[0\]: expected one dimension"),
        (lambda: pack_sequences([[1], [True]]), TypeError, r"sequences\[1\]: expected integers, got bool"),
        (lambda: pack_sequences([torch.ones(2)]), TypeError, r"sequences\[0\]: expected integers, got float32"),
        (lambda: pack_sequences([torch.ones(1, 2).long()]), ValueError, r"sequences\[0\]: expected one dimension"),
        (lambda: pack_sequences(torch.ones(2, 3)), TypeError, "sequences: expected integers, got float32"),
        (
            lambda: pack_sequences([[1]], attention_mask=[[1]]),
            ValueError,
            "attention_mask: expected it beside a padded",
        ),
        (lambda: pack_sequences(MATRIX, attention_mask=MATRIX[:1]), ValueError, r"attention_mask: expected shape \(2"),
        (lambda: pack_sequences(MATRIX, attention_mask=MATRIX * 2), ValueError, "expected zeros and ones, got 2"),
        (lambda: pack_sequences(MATRIX, loss_mask=[[0, 1, 1]]), ValueError, r"loss_mask: expected shape \(2, 3\)"),
        (
            lambda: pack_sequences(MATRIX, attention_mask=MATRIX.tril(), loss_mask=1 - MATRIX.tril(-1)),
            ValueError,
            "loss_mask: expected 0 where attention_mask is 0, got 1 in row 0, column 1",
        ),
        (lambda: pack_sequences([[1, 2]], loss_mask=[]), ValueError, "loss_mask: expected 1 vectors"),
        (lambda: pack_sequences([[], [1, 2]], loss_mask=[[], [0]]), ValueError, r"loss_mask\[1\]: expected 2 values"),
        (lambda: pack_sequences([[], [1, 2]], loss_mask=[[], [1, 1]]), ValueError, r"loss_mask\[1\]: expected 0 for"),
        (lambda: pack_sequences([[1, 2]], loss_mask=[[0, 2]]), ValueError, "loss_mask: expected zeros and ones, got 2"),
        (lambda: pack_sequences([[1, 2]], weights=[1, 2]), ValueError, "weights: expected one for each of the 1 seq"),
        (lambda: pack_sequences([[1, 2]], share_within=[]), ValueError, "share_within: expected one for each of the 1"),
        (lambda: pack_sequences([[1, 2]], weights=[["a", "b"]]), TypeError, r"weights\[0\]: expected numbers"),
        (
            lambda: BATCH.expand(torch.zeros(5)),
            ValueError,
            r"values: expected shape \(4,\)|values: expected shape \(3,",
        ),
        (lambda: BATCH.scatter(torch.zeros(3)), ValueError, r"values: expected shape \(4,\)"),
        (lambda: BATCH.take(torch.zeros(3, 3)), ValueError, r"padded: expected \[2, columns\]"),
        (lambda: BATCH.take(torch.zeros(2, 2)), ValueError, "padded: expected columns 1 to 2, where the targets are"),
        (lambda: BATCH.take(torch.zeros(2, 3), first_column=2), ValueError, "first_column 2 and 3 columns hold 2 to 4"),
        (lambda: join_turns([[1]], [], loss_mask=[1]), ValueError, "parents: expected one for each of the 1 nodes"),
        (
            lambda: join_turns([[1]], [1], loss_mask=[1]),
            ValueError,
            r"parents: expected -1 \(a root\) or a node below 1",
        ),
        (lambda: join_turns([[1]], [-1], loss_mask=[1, 0]), ValueError, "loss_mask: expected one for each of the 1"),
        (lambda: join_turns([[1]], [-1], loss_mask=[[1, 0]]), ValueError, r"loss_mask\[0\]: expected 1 values"),
        (
            lambda: join_turns([[1]], [-1], loss_mask=[1], ends=[-1]),
            ValueError,
            "ends: expected a turn from 0 to 0, got -1",
        ),
        (lambda: join_turns([[1], [2]], [1, 0], loss_mask=[1, 1]), ValueError, "but node 0 is its own ancestor"),
        (lambda: join_turns([[1], [2.0]], [-1, 0], loss_mask=[1, 1]), TypeError, r"turns\[1\]: expected integers"),
    ],
)
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
