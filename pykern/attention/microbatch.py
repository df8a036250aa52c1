"""Micro-batches of sequences that share prefixes: which sequences go together, and what sharing saves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .host import GivenSequences
from .sequences import PackedSequences, pack_part, sort_sequences, token_values
from .trie import SortedSequences


@dataclass(frozen=True)
class MicrobatchPlan:
    """Which sequences go into which micro-batch. Numbers are those of the given sequences.

    microbatches: the sequences of each, ascending. left_out: those that were too long, in none of them.
    tokens, pairs, longest: of each micro-batch, its packed tokens, the query-key pairs that see each other, and the
        tokens of its longest sequence.
    repeated_tokens, repeated_pairs: the same for all sequences in the micro-batches, if nothing were shared.
    """

    microbatches: list[list[int]]
    left_out: list[int]
    tokens: list[int]
    pairs: list[int]
    longest: list[int]
    repeated_tokens: int
    repeated_pairs: int

    @property
    def packed_tokens(self) -> int:
        """Tokens of all micro-batches, each shared prefix counted once in every micro-batch that has it."""
        return sum(self.tokens)

    @property
    def tokens_saved(self) -> int:
        """Tokens that need not be computed because sequences share them."""
        return self.repeated_tokens - self.packed_tokens

    def flops(
        self,
        num_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        num_layers: int = 1,
        parameters: int = 0,
        backward: bool = False,
    ) -> tuple[int, int]:
        """Floating-point operations of all micro-batches, as packed and if nothing were shared.

        Attention's two products on visible pairs (and the five of its backward) in each layer; and two per token
        (six with `backward`) for each of `parameters`, the weights of all layers that every token is multiplied with.
        """
        value_dim = head_dim if value_dim is None else value_dim
        products = head_dim + value_dim + backward * (3 * head_dim + 2 * value_dim)
        per_pair, per_token = 2 * num_layers * num_heads * products, (6 if backward else 2) * parameters
        return (
            per_pair * sum(self.pairs) + per_token * self.packed_tokens,
            per_pair * self.repeated_pairs + per_token * self.repeated_tokens,
        )

    def __str__(self) -> str:
        """One line for a log."""
        sequences = sum(map(len, self.microbatches))
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        return (
            f"{sequences} sequences in {len(self.microbatches)} micro-batches{left_out}: "
            f"{self.repeated_tokens} tokens packed as {self.packed_tokens} "
            f"({_times(self.repeated_tokens, self.packed_tokens)}), "
            f"{_times(self.repeated_pairs, sum(self.pairs))} fewer pairs in attention"
        )


def plan_microbatches(
    sequences: Sequence[Sequence[int] | Tensor] | Tensor,
    *,
    max_tokens: int,
    max_length: int | None = None,
    too_long: str = "raise",
    multiple_of: int = 1,
    attention_mask: Tensor | None = None,
    share_within: Sequence[int] | Tensor | None = None,
) -> MicrobatchPlan:
    """Spreads sequences over micro-batches, so that those with a common prefix lie together.

    A micro-batch holds at most `max_tokens` packed tokens, where a prefix that its sequences share counts once. All
    sequences with a common prefix that fit into one micro-batch together are in one; a larger set is split at its own
    branches, largest parts first into the first micro-batch with room (first-fit decreasing), and the prefix is
    repeated in each. What remains of one set fills up with the next.

    sequences, attention_mask, share_within: as for `pack_sequences`.
    max_tokens: packed tokens of a micro-batch, what bounds its memory.
    max_length: tokens of one sequence, what bounds positions; `max_tokens` by default.
    too_long: what becomes of a longer sequence, "raise" (ValueError) or "leave_out".
    multiple_of: makes the number of micro-batches a multiple of this, such as the number of data-parallel ranks, by
        splitting the largest ones; ValueError with fewer sequences than that takes.
    """
    given = GivenSequences.of(sequences, attention_mask)
    ordered = sort_sequences(given, share_within)
    return _plan(ordered, max_tokens, max_length, too_long, multiple_of)[0]


def fill_microbatches(
    sequences: Sequence[Sequence[int] | Tensor] | Tensor,
    *,
    max_tokens: int,
    max_length: int | None = None,
    too_long: str = "raise",
    multiple_of: int = 1,
    attention_mask: Tensor | None = None,
    loss_mask: Sequence[Sequence[int] | Tensor] | Tensor | None = None,
    weights: Sequence[float] | Sequence[Sequence[float] | Tensor] | Tensor | None = None,
    share_within: Sequence[int] | Tensor | None = None,
) -> tuple[list[PackedSequences], MicrobatchPlan]:
    """`plan_microbatches`, and each of its micro-batches as `pack_sequences` would make it.

    In every batch `sequence_ids` and `target_sequences` are the numbers of the given sequences, and `take` and
    `scatter` mean the matrix of all of them.
    """
    given = GivenSequences.of(sequences, attention_mask)
    trained, scales = token_values(given, loss_mask, weights)
    ordered = sort_sequences(given, share_within)
    plan, parts = _plan(ordered, max_tokens, max_length, too_long, multiple_of)
    return [pack_part(given, part, trained, scales) for part in parts], plan


def _plan(
    ordered: SortedSequences, max_tokens: int, max_length: int | None, too_long: str, multiple_of: int
) -> tuple[MicrobatchPlan, list[SortedSequences]]:
    limits = {"max_tokens": max_tokens, "max_length": max_length, "multiple_of": multiple_of}
    for name, limit in limits.items():
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise TypeError(f"{name}: expected an integer, got {type(limit).__name__}")
        if limit is not None and limit < 1:
            raise ValueError(f"{name}: expected at least 1, got {limit}")
    if too_long not in ("raise", "leave_out"):
        raise ValueError(f'too_long: expected "raise" or "leave_out", got {too_long!r}')
    bound = max_tokens if max_length is None else min(max_tokens, max_length)
    fits = ordered.lengths <= bound
    left_out = sorted(ordered.index[~fits].tolist())
    if left_out and too_long == "raise":
        name = "max_tokens" if bound == max_tokens else "max_length"
        length = ordered.lengths[ordered.index == left_out[0]][0]
        raise ValueError(
            f"{name}: expected at least {length}, the tokens of sequence {left_out[0]}, got {bound}; shorten it, or "
            'pass too_long="leave_out"'
        )
    if left_out:
        ordered = ordered.part(np.flatnonzero(fits))

    bundles = _bundles(ordered.lengths.tolist(), ordered.shared.tolist(), max_tokens)
    parts = [ordered.part(np.sort(np.asarray(bundle.places, dtype=np.int64))) for bundle in bundles]
    while len(parts) % multiple_of:
        parts += _halves(parts, multiple_of)
    plan = MicrobatchPlan(
        [sorted(part.index.tolist()) for part in parts],
        left_out,
        [int(part.added.sum()) for part in parts],
        [_pairs(part.lengths) - _pairs(part.shared) for part in parts],
        [int(part.lengths.max()) for part in parts],
        int(ordered.lengths.sum()),
        _pairs(ordered.lengths),
    )
    return plan, parts


def _pairs(lengths: np.ndarray) -> int:
    """Pairs of all tokens of paths of these lengths: a token sees those before it and itself."""
    return int((lengths * (lengths + 1) // 2).sum())


def _times(more: int, less: int) -> str:
    return f"{more / less:.2f}x" if less else "1.00x"


@dataclass
class _Bundle:
    """Sequences that stay together. tokens: those below the tokens that all of its neighbours share too."""

    tokens: int
    places: list[int]


def _bundles(lengths: list[int], shared: list[int], capacity: int) -> list[_Bundle]:
    """One bundle for each micro-batch; the sequences by their lengths and what each shares with the one before.

    The branching nodes of the trie are closed children first. Each makes as few bundles as it can of those of its
    children, beside the path above them; what it could not join, no node above it can, where the path is shorter
    but the bundles are longer by as much.
    """
    open_nodes: list[tuple[int, list[_Bundle]]] = [(0, [])]  # (tokens of the path to its end, bundles), root to tip

    def close(down_to: int) -> None:
        while open_nodes[-1][0] > down_to:
            stop, bundles = open_nodes.pop()
            begin = max(down_to, open_nodes[-1][0])
            bundles = _first_fit_decreasing(bundles, capacity - stop)
            for bundle in bundles:
                bundle.tokens += stop - begin
            if open_nodes[-1][0] < begin:
                open_nodes.append((begin, bundles))
            else:
                open_nodes[-1][1].extend(bundles)

    for place, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        close(common)
        bundle = _Bundle(0, [place])
        if length == common:
            open_nodes[-1][1].append(bundle)
        else:
            open_nodes.append((length, [bundle]))
    close(0)
    return _first_fit_decreasing(open_nodes[0][1], capacity)


def _first_fit_decreasing(bundles: list[_Bundle], capacity: int) -> list[_Bundle]:
    """The bundles joined, the largest first, each to the first that has room for it."""
    if len(bundles) <= 1:
        return bundles
    bundles = sorted(bundles, key=lambda bundle: -bundle.tokens)
    joined: list[_Bundle] = []
    # No two of the joined bundles would fit into one, which bounds their number. A binary tree over them, each node
    # the most room below it, finds the first with room in as many steps as it is deep.
    total = sum(bundle.tokens for bundle in bundles)
    most = min(len(bundles), 2 * total // max(capacity, 1) + 1)
    leaves = 1 << (most - 1).bit_length()
    room = [capacity] * (2 * leaves)
    for bundle in bundles:
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < bundle.tokens
        if node - leaves < len(joined):
            into = joined[node - leaves]
            into.tokens += bundle.tokens
            into.places.extend(bundle.places)
        else:
            joined.append(bundle)
        room[node] -= bundle.tokens
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return joined


def _halves(parts: list[SortedSequences], multiple_of: int) -> list[SortedSequences]:
    """Takes the largest micro-batch that can be split out of `parts` and returns its two halves, of like tokens."""
    wide = [number for number, part in enumerate(parts) if len(part.index) > 1]
    if not wide:
        raise ValueError(
            f"multiple_of: expected at most as many micro-batches as sequences, but {len(parts)} sequences cannot make "
            f"a multiple of {multiple_of}"
        )
    part = parts.pop(max(wide, key=lambda number: int(parts[number].added.sum())))
    before = np.cumsum(part.added)[:-1]
    after = part.added.sum() - before + part.shared[1:]
    cut = int(np.maximum(before, after).argmin()) + 1
    places = np.arange(len(part.index))
    return [part.part(places[:cut]), part.part(places[cut:])]


__all__ = ["MicrobatchPlan", "fill_microbatches", "plan_microbatches"]
