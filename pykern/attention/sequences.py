"""Packing whole sequences, such as multi-turn rollouts: every shared prefix once, a loss for each sequence still."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .host import GivenSequences, host_vector, inverse_of_rows, ranges
from .rows import gather_rows
from .tree import PrefixTree
from .trie import SortedSequences


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Sequences as one row of tokens, and the targets of each. T packed tokens, S sequences.

    N targets: the tokens of all sequences that the loss is defined on, sequence after sequence. Sequences share them
    as they share prefixes, so U <= N of them are distinct: pairs of a packed row and the token after it. A row where
    sequences part has several. What costs (the logits) is computed for the U, what the loss needs for the N:

        logprobs = linear_token_logprobs(batch.gather(hidden), weight, batch.targets)        # [U]
        logprobs = batch.expand(logprobs)                                                    # [N]
        loss, metrics = policy_loss(logprobs, batch.take(old_logprobs), ..., cu_seqlens=batch.cu_seqlens)

    A loss that is a weighted sum of log-probabilities can stay with the U: `-(logprobs * batch.target_weights).sum()`.

    token_ids: int64 [T]. tree: the PrefixTree of the T tokens, with the S sequences: `tree.sequence_rows` and
        `tree.cu_seqlens` lead from every token of every sequence to its packed row.
    predictor_rows, targets: int64 [U], the packed row whose hidden state predicts each distinct target, and its token.
    predictor_order, predictor_offsets: int64 [U] and [T + 1], the inverse of `predictor_rows`: row t predicts the
        targets `predictor_order[predictor_offsets[t] : predictor_offsets[t + 1]]`.
    target_index: int64 [N], which of the U each of the N is. target_order, target_offsets: int64 [N] and [U + 1], its
        inverse.
    target_weights: float32 [U], the sum of the weights of the N.
    weights: float32 [N], as given; ones if none were.
    cu_seqlens: int32 [S + 1]; sequence s owns the targets `cu_seqlens[s]` to `cu_seqlens[s + 1]` of the N.
    sequence_ids: int64 [S], the number of each sequence among the G given ones: 0 to S - 1, or those of a micro-batch.
    copies: int64 [S], how many of the S sequences have the same tokens as this one, itself counted.
    target_sequences, target_columns: int64 [N], where each target was given: its sequence among the G, and its place
        there (its column, where a padded matrix was given).
    given_shape: (G, W), of the padded matrix, or of that which would hold the given lists.
    """

    token_ids: Tensor
    tree: PrefixTree
    predictor_rows: Tensor
    targets: Tensor
    predictor_order: Tensor
    predictor_offsets: Tensor
    target_index: Tensor
    target_order: Tensor
    target_offsets: Tensor
    target_weights: Tensor
    weights: Tensor
    cu_seqlens: Tensor
    sequence_ids: Tensor
    copies: Tensor
    target_sequences: Tensor
    target_columns: Tensor
    given_shape: tuple[int, int]
    _columns: tuple[int, int]  # first and one past the last of target_columns

    @property
    def multiplicity(self) -> Tensor:
        """int64 [U]: how many of the N each distinct target stands for."""
        return self.target_offsets.diff()

    def gather(self, hidden: Tensor) -> Tensor:
        """[U, C]: the row of `hidden` [T, C] that predicts each distinct target; see `gather_rows`."""
        return gather_rows(hidden, self.predictor_rows, order=self.predictor_order, offsets=self.predictor_offsets)

    def expand(self, values: Tensor) -> Tensor:
        """[N] from [U]: what was computed for the distinct targets, for the targets of each sequence.

        Differentiable, with a gradient that is summed in one fixed order; see `gather_rows`.
        """
        if values.shape != self.targets.shape:
            raise ValueError(
                f"values: expected shape {tuple(self.targets.shape)}, one for each distinct target, "
                f"got {tuple(values.shape)}"
            )
        return gather_rows(values[:, None], self.target_index, order=self.target_order, offsets=self.target_offsets)[
            :, 0
        ]

    def take(self, padded: Tensor, *, first_column: int = 0) -> Tensor:
        """[N] from [G, W]: what a padded matrix holds for each target, such as its old log-probability.

        first_column: the column of the given matrix that is column 0 of `padded`: the prompt's width, where `padded`
            holds responses only.
        """
        self._check_matrix(padded.shape, first_column)
        return padded[self.target_sequences, self.target_columns - first_column]

    def scatter(self, values: Tensor, *, first_column: int = 0, width: int | None = None, fill: float = 0.0) -> Tensor:
        """[G, W] from [N]: the inverse of `take`, `fill` where no target is. Differentiable.

        width: columns of the result; by default those of the given matrix behind `first_column`.
        """
        if values.shape != self.target_columns.shape:
            raise ValueError(
                f"values: expected shape {tuple(self.target_columns.shape)}, one for each target of each sequence, "
                f"got {tuple(values.shape)}"
            )
        shape = (self.given_shape[0], self.given_shape[1] - first_column if width is None else width)
        self._check_matrix(shape, first_column)
        places = (self.target_sequences, self.target_columns - first_column)
        return values.new_full(shape, fill).index_put(places, values)

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> "PackedSequences":
        """The same batch on `device`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return PackedSequences(
            **{name: part.to(device) if hasattr(part, "to") else part for name, part in parts.items()}
        )

    def _check_matrix(self, shape: Sequence[int], first_column: int) -> None:
        first, stop = self._columns
        if len(shape) != 2 or shape[0] != self.given_shape[0]:
            raise ValueError(
                f"padded: expected [{self.given_shape[0]}, columns], a row for each given sequence, got {tuple(shape)}"
            )
        if first < stop and not first_column <= first <= stop <= first_column + shape[1]:
            raise ValueError(
                f"padded: expected columns {first} to {stop - 1}, where the targets are, but first_column "
                f"{first_column} and {shape[1]} columns hold {first_column} to {first_column + shape[1] - 1}"
            )


def pack_sequences(
    sequences: Sequence[Sequence[int] | Tensor] | Tensor,
    *,
    attention_mask: Tensor | None = None,
    loss_mask: Sequence[Sequence[int] | Tensor] | Tensor | None = None,
    weights: Sequence[float] | Sequence[Sequence[float] | Tensor] | Tensor | None = None,
    share_within: Sequence[int] | Tensor | None = None,
) -> PackedSequences:
    """Packs the token trie of the sequences: what any of them have in common at their beginning is stored once.

    The sequences can be rollouts of many turns that branch anywhere, that end where others go on, that are identical,
    that share a system prompt; nothing has to say which share what.

    sequences: token ids, 1-D each, of any length; or a padded matrix [G, W].
    attention_mask: [G, W], 1 where the padded matrix has a token, padding on either side; all by default.
    loss_mask: zeros and ones in the shape of `sequences`: which tokens the loss is defined on. By default all but the
        first of each sequence, which has no token before it that could predict it.
    weights: numbers in the shape of `sequences`, or one for each sequence; those of the targets are kept.
    share_within: one integer for each sequence; those with different ones share nothing. For tokens that don't say all
        of what the model reads, such as placeholders of images. By default all may share.

    Raises ValueError where the loss mask has the first token of a sequence.
    """
    given = GivenSequences.of(sequences, attention_mask)
    trained, scales = token_values(given, loss_mask, weights)
    return pack_part(given, sort_sequences(given, share_within), trained, scales)


def sort_sequences(given: GivenSequences, share_within: Sequence[int] | Tensor | None) -> SortedSequences:
    groups = None
    if share_within is not None:
        groups = host_vector(share_within, "share_within")
        if len(groups) != len(given.lengths):
            raise ValueError(
                f"share_within: expected one for each of the {len(given.lengths)} sequences, got {len(groups)}"
            )
    return SortedSequences.of(given.tokens, given.starts, given.lengths, groups)


def token_values(given: GivenSequences, loss_mask, weights) -> tuple[np.ndarray, np.ndarray | None]:
    """Which of the M given tokens are targets, bool [M], and their weights, float32 [M] or None."""
    first = given.starts[given.lengths > 0]
    if loss_mask is None:
        trained = np.ones(len(given.tokens), dtype=bool)
        trained[first] = False
    else:
        trained = given.mask(loss_mask, "loss_mask")
        if trained[first].any():
            wrong = np.flatnonzero(given.lengths > 0)[trained[first].argmax()]
            raise ValueError(
                f"loss_mask[{wrong}]: expected 0 for the first token, got 1; no token before it predicts it: mask it, "
                "or begin the sequence with a begin-of-sequence token"
            )
    if weights is None:
        return trained, None
    if getattr(weights, "ndim", 1) == 1 and all(np.ndim(weight) == 0 for weight in weights):
        each = host_vector(weights, "weights", "biuf")
        if len(each) != len(given.lengths):
            raise ValueError(f"weights: expected one for each of the {len(given.lengths)} sequences, got {len(each)}")
        return trained, np.repeat(each.astype(np.float32), given.lengths)
    return trained, given.values(weights, "weights").astype(np.float32)


# What is made in inference mode could never be saved for a backward.
@torch.inference_mode(False)
def pack_part(
    given: GivenSequences, part: SortedSequences, trained: np.ndarray, scales: np.ndarray | None
) -> PackedSequences:
    """Packs some of the given sequences, in the order they were given; `trained` and `scales` are of all."""
    sequence_ids = np.sort(part.index)
    lengths = given.lengths[sequence_ids]
    rows = part.rows()
    tree, token_ids = PrefixTree._from_trie(rows, lengths)

    # Places of the part's tokens: among its own, and among all that were given.
    taken = ranges(given.starts[sequence_ids], lengths)
    own = np.flatnonzero(trained[taken])
    places = taken[own]
    own_sequences = np.repeat(np.arange(len(lengths)), lengths)[own]
    target_sequences = sequence_ids[own_sequences]
    cu_seqlens = np.concatenate([[0], np.cumsum(np.bincount(own_sequences, minlength=len(lengths)))])

    # In a trie a row and the token after it make one row, that token's own.
    target_rows = rows.sequence_rows[own]
    uses = np.bincount(target_rows, minlength=tree.num_tokens)
    distinct = np.flatnonzero(uses)
    target_index = (np.cumsum(uses > 0) - 1)[target_rows]
    parents = np.empty(tree.num_tokens, dtype=np.int64)
    parents[target_rows] = rows.sequence_rows[own - 1]
    predictor_rows = parents[distinct]

    if scales is None:
        weights, summed = np.ones(len(own), dtype=np.float32), uses[distinct]
    else:
        weights = scales[places]
        summed = np.bincount(target_index, weights=weights, minlength=len(distinct))
    _, which, counts = np.unique(rows.last_rows, return_inverse=True, return_counts=True)
    columns = given.columns(places, target_sequences)
    return PackedSequences(
        token_ids,
        tree,
        torch.from_numpy(predictor_rows),
        torch.from_numpy(rows.tokens[distinct]),
        *map(torch.from_numpy, inverse_of_rows(predictor_rows, tree.num_tokens)),
        torch.from_numpy(target_index),
        *map(torch.from_numpy, inverse_of_rows(target_index, len(distinct))),
        torch.from_numpy(summed.astype(np.float32)),
        torch.from_numpy(weights),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        torch.from_numpy(sequence_ids),
        torch.from_numpy(counts[which].astype(np.int64)),
        torch.from_numpy(target_sequences),
        torch.from_numpy(columns),
        (len(given.lengths), given.width),
        (int(columns.min()), int(columns.max()) + 1) if len(columns) else (0, 0),
    )


def join_turns(
    turns: Sequence[Sequence[int] | Tensor],
    parents: Sequence[int],
    *,
    loss_mask: Sequence[int] | Sequence[Sequence[int] | Tensor],
    ends: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences and loss masks, as `pack_sequences` takes them, from rollouts recorded as a tree of turns.

    turns: token ids of each turn (a system prompt, a message, a tool's answer, ...), empty ones allowed.
    parents: the turn before each, -1 for none. Turns may come in any order, and branch anywhere.
    loss_mask: zero or one for each turn (one where the model wrote it), or for each of its tokens.
    ends: the turns that rollouts end with, one sequence for each, in this order: an inner turn for a rollout that ends
        where others go on, the same turn twice for identical rollouts. By default the turns that none follows.

    Returns a list of int64 tensors and one of bool tensors. A token of a shared turn is a target of every sequence
    through it; weights of 1 / `PackedSequences.multiplicity` count it once.
    """
    given = GivenSequences.of(turns, name="turns")
    flat, lengths = given.tokens, given.lengths
    above = host_vector(parents, "parents")
    count = len(lengths)
    # Refuses parents that make no forest; a turn in a circle would otherwise be in no sequence.
    PrefixTree.from_parents(lengths, above)
    if all(np.ndim(value) == 0 for value in loss_mask):
        each = host_vector(loss_mask, "loss_mask", "biuf")
        if len(each) != count:
            raise ValueError(f"loss_mask: expected one for each of the {count} turns, got {len(each)}")
        trained = np.repeat(each != 0, lengths)
    else:
        trained = given.mask(loss_mask, "loss_mask")
    if ends is None:
        followed = np.zeros(count, dtype=bool)
        followed[above[above >= 0]] = True
        last_turns = np.flatnonzero(~followed)
    else:
        last_turns = host_vector(ends, "ends")
        wrong = last_turns[(last_turns < 0) | (last_turns >= count)]
        if len(wrong):
            raise ValueError(f"ends: expected a turn from 0 to {count - 1}, got {wrong[0]}")

    stops = (given.starts + lengths).tolist()
    pieces = [slice(start, stop) for start, stop in zip(given.starts.tolist(), stops, strict=True)]
    parent_list = above.tolist()
    sequences, masks = [], []
    for turn in last_turns.tolist():
        path = []
        while turn >= 0:
            path.append(pieces[turn])
            turn = parent_list[turn]
        path.reverse()
        sequences.append(torch.from_numpy(np.concatenate([flat[piece] for piece in path])))
        masks.append(torch.from_numpy(np.concatenate([trained[piece] for piece in path])))
    return sequences, masks


__all__ = ["PackedSequences", "join_turns", "pack_sequences"]
