"""The token trie of many sequences: sorted, so that sequences with a common prefix lie together."""

from dataclasses import dataclass

import numpy as np

from .host import ranges


@dataclass(frozen=True, eq=False)
class TrieRows:
    """A trie laid out in depth-first order. T rows; the S sequences and their M tokens in the order given.

    subtree_end, position, tokens: int64 [T]. last_rows: int64 [S], -1 for an empty sequence.
    sequence_rows: int64 [M], the row of every token of every sequence.
    """

    subtree_end: np.ndarray
    position: np.ndarray
    tokens: np.ndarray
    last_rows: np.ndarray
    sequence_rows: np.ndarray


@dataclass(frozen=True, eq=False)
class SortedSequences:
    """S sequences in the order of their tokens, which is that of the leaves of their trie.

    tokens: int64 [M], of all sequences. Per sequence, in sorted order, int64 [S] each: index, its number among those
    given; starts, its first place in tokens; lengths; shared, the tokens it has in common with the one before it.
    Of two sequences apart, the tokens in common are the least `shared` between them, so any part of the sorted
    sequences is sorted too, and its trie needs no second look at the tokens.
    """

    tokens: np.ndarray
    index: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    shared: np.ndarray

    @classmethod
    def of(
        cls, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, groups: np.ndarray | None = None
    ) -> "SortedSequences":
        """groups: int64 [S]; if given, sequences of different groups count as having nothing in common."""
        keys = _byte_keys(tokens, starts, lengths)
        order = np.asarray(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
        if groups is not None:
            order = order[np.argsort(groups[order], kind="stable")]
        starts, lengths = starts[order], lengths[order]
        shared = _shared_with_previous(tokens, starts, lengths)
        if groups is not None:
            shared[1:][np.diff(groups[order]) != 0] = 0
        return cls(tokens, order, starts, lengths, shared)

    def part(self, places: np.ndarray) -> "SortedSequences":
        """The sequences at `places` of the sorted order, ascending."""
        shared = np.zeros(len(places), dtype=np.int64)
        if len(places) > 1:
            shared[1:] = np.minimum.reduceat(self.shared[: places[-1] + 1], places[:-1] + 1)
        return SortedSequences(self.tokens, self.index[places], self.starts[places], self.lengths[places], shared)

    @property
    def added(self) -> np.ndarray:
        """int64 [S]: the rows that each sequence adds to the trie of those before it."""
        return self.lengths - self.shared

    def rows(self) -> TrieRows:
        """The trie's rows: a token, then all that follows it, siblings in the order of their ids."""
        count = len(self.index)
        added = self.added
        stops = np.cumsum(added)
        total = int(stops[-1]) if count else 0
        firsts = stops - added

        # Where each sequence's rows go in the order given.
        given = np.empty(count, dtype=np.int64)
        given[np.argsort(self.index)] = np.arange(count)
        lengths_as_given = np.empty(count, dtype=np.int64)
        lengths_as_given[given] = self.lengths
        outs = (np.cumsum(lengths_as_given) - lengths_as_given)[given]

        ends = np.full(total, total, dtype=np.int64)
        every_row = np.arange(total)
        sequence_rows = np.empty(int(self.lengths.sum()), dtype=np.int64)
        open_runs: list[tuple[int, int, int]] = []  # (first position, first row, stop row), root to tip
        before = 0
        columns = (self.shared, self.lengths, added, firsts, outs)
        for shared, length, new, row, out in zip(*(column.tolist() for column in columns), strict=True):
            while open_runs and open_runs[-1][0] >= shared:
                _, first, stop = open_runs.pop()
                ends[first:stop] = row
            if open_runs:
                position, first, stop = open_runs[-1]
                kept = first + shared - position
                if kept < stop:
                    ends[kept:stop] = row
                    open_runs[-1] = (position, first, kept)
            if new:
                open_runs.append((shared, row, row + new))
            if shared:
                sequence_rows[out : out + shared] = sequence_rows[before : before + shared]
            sequence_rows[out + shared : out + length] = every_row[row : row + new]
            before = out

        # A sequence that adds nothing is empty or equal to the one before it.
        last_rows = np.empty(count, dtype=np.int64)
        last_rows[given] = np.where(self.lengths > 0, stops - 1, -1)
        return TrieRows(
            ends,
            ranges(self.shared, added),
            self.tokens[ranges(self.starts + self.shared, added)],
            last_rows,
            sequence_rows,
        )


def _byte_keys(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    """Bytes of each sequence that compare as its token ids do: big-endian, counted from the smallest id."""
    least, most = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    size = 2 if most - least < 2**16 else 4 if most - least < 2**32 else 8
    if size == 8:
        # Flipping the sign bit counts from the smallest int64.
        data = (tokens ^ np.int64(-(2**63))).astype(">i8").tobytes()
    else:
        data = (tokens - least).astype(f">u{size}").tobytes()
    begins, stops = (starts * size).tolist(), ((starts + lengths) * size).tolist()
    return [data[begin:stop] for begin, stop in zip(begins, stops, strict=True)]


def _shared_with_previous(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    shared = np.zeros(len(lengths), dtype=np.int64)
    common = np.minimum(lengths[:-1], lengths[1:])
    # The first tokens of all at once; only those that share all of these are looked at one by one.
    heads = np.minimum(common, 64)
    begins = np.cumsum(heads) - heads
    different = np.flatnonzero(tokens[ranges(starts[:-1], heads)] != tokens[ranges(starts[1:], heads)])
    first = np.append(different, heads.sum())[np.searchsorted(different, begins)]
    shared[1:] = np.minimum(first - begins, heads)
    for place in (np.flatnonzero((shared[1:] == 64) & (common > 64)) + 1).tolist():
        above, below = (tokens[starts[at] + 64 : starts[at] + lengths[at]] for at in (place - 1, place))
        shared[place] += _common_prefix(above, below)
    return shared


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    # In growing blocks: most neighbours differ early or share nearly everything.
    begin, block = 0, 256
    while begin < length:
        end = min(begin + block, length)
        different = a[begin:end] != b[begin:end]
        first = int(different.argmax())
        if different[first]:
            return begin + first
        begin, block = end, block * 4
    return length


__all__ = ["SortedSequences", "TrieRows"]
