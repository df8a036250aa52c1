"""What users give as lists, arrays or tensors, as flat numpy arrays on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

_INTEGERS, _NUMBERS = "iu", "biuf"
_KIND_NAMES = {_INTEGERS: "integers", _NUMBERS: "numbers"}


def host_vector(values: Sequence[int] | Tensor, name: str, kinds: str = _INTEGERS) -> np.ndarray:
    """One dimension of numbers: int64, or the dtype they came in where `kinds` allows other than integers."""
    try:
        array = _host_array(values)
    except ValueError as error:
        raise ValueError(f"{name}: expected one dimension, got lists of unequal lengths") from error
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {array.shape}")
    if array.size and array.dtype.kind not in kinds:
        raise TypeError(f"{name}: expected {_KIND_NAMES[kinds]}, got {array.dtype}")
    return array.astype(np.int64 if kinds == _INTEGERS else array.dtype)


def host_vectors(vectors: Sequence, name: str, kinds: str = _INTEGERS) -> tuple[np.ndarray, np.ndarray]:
    """Many vectors one after the other, and their lengths (int64)."""
    vectors = list(vectors)
    flat = _flat_at_once(vectors)
    if flat is None or flat[0].dtype.kind not in kinds:
        # The slow way round, which names the vector that is not as expected.
        arrays = [host_vector(vector, f"{name}[{index}]", kinds) for index, vector in enumerate(vectors)]
        lengths = np.asarray([len(array) for array in arrays], dtype=np.int64)
        return (np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)), lengths
    values, lengths = flat
    return (values.astype(np.int64, copy=False) if kinds == _INTEGERS else values), lengths


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then those of starts[1], and so on."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def inverse_of_rows(rows: np.ndarray, source_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What `invert_rows` returns, several times as fast on the host."""
    counts = np.bincount(rows, minlength=source_rows)
    # numpy's stable sort takes linear time for 16 bits only.
    order = np.argsort(rows.astype(np.uint16), kind="stable")
    for shift in range(16, max(source_rows - 1, 0).bit_length(), 16):
        order = order[np.argsort((rows >> shift).astype(np.uint16)[order], kind="stable")]
    return order, np.concatenate([[0], np.cumsum(counts)])


@dataclass(frozen=True, eq=False)
class GivenSequences:
    """Token sequences as they were given: G sequences, M tokens in all, the widest of W columns.

    tokens: int64 [M], sequence after sequence. starts, lengths: int64 [G], where each begins and its tokens.
    selected: bool [G, W], which places of a padded matrix are tokens, and selected_columns: int64 [M], the column of
        each; None for lists.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    width: int
    selected: np.ndarray | None = None
    selected_columns: np.ndarray | None = None

    @classmethod
    def of(
        cls, sequences: Sequence | Tensor, attention_mask: Tensor | None = None, name: str = "sequences"
    ) -> "GivenSequences":
        padded = getattr(sequences, "ndim", 1) == 2
        if attention_mask is not None and not padded:
            raise ValueError(f"attention_mask: expected it beside a padded matrix only, but {name} are lists; drop it")
        if not padded:
            tokens, lengths = host_vectors(sequences, name)
            return cls(tokens, np.cumsum(lengths) - lengths, lengths, int(lengths.max(initial=0)))

        matrix = _host_array(sequences)
        if matrix.dtype.kind not in _INTEGERS:
            raise TypeError(f"{name}: expected integers, got {matrix.dtype}")
        selected = np.ones(matrix.shape, dtype=bool)
        if attention_mask is not None:
            selected = _zeros_and_ones(_matrix_like(attention_mask, matrix.shape, "attention_mask"), "attention_mask")
        lengths = selected.sum(axis=1)
        tokens = matrix[selected].astype(np.int64)
        columns = selected.nonzero()[1]
        return cls(tokens, np.cumsum(lengths) - lengths, lengths, matrix.shape[1], selected, columns)

    def columns(self, places: np.ndarray, sequences: np.ndarray) -> np.ndarray:
        """Where tokens[places], which are of these sequences, were given: in their lists, or columns of the matrix."""
        return places - self.starts[sequences] if self.selected is None else self.selected_columns[places]

    def values(self, values: Sequence | Tensor, name: str) -> np.ndarray:
        """[M]: the number of each token, given as the tokens were: a vector per sequence, or a padded matrix."""
        if self.selected is not None:
            return _matrix_like(values, self.selected.shape, name)[self.selected]
        flat, lengths = host_vectors(values, name, _NUMBERS)
        if len(lengths) != len(self.lengths):
            raise ValueError(
                f"{name}: expected {len(self.lengths)} vectors, one for each list of tokens, got {len(lengths)}"
            )
        if (lengths != self.lengths).any():
            wrong = np.flatnonzero(lengths != self.lengths)[0]
            raise ValueError(
                f"{name}[{wrong}]: expected {self.lengths[wrong]} values, one for each token, got {lengths[wrong]}"
            )
        return flat

    def mask(self, values: Sequence | Tensor, name: str) -> np.ndarray:
        """bool [M], from zeros and ones."""
        flat = _zeros_and_ones(self.values(values, name), name)
        if self.selected is not None:
            outside = _host_array(values).astype(bool) & ~self.selected
            if outside.any():
                row, column = (int(place[0]) for place in outside.nonzero())
                raise ValueError(f"{name}: expected 0 where attention_mask is 0, got 1 in row {row}, column {column}")
        return flat


def _host_array(values: Sequence | Tensor) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach()
        # numpy has no bfloat16.
        return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
    return np.asarray(values)


def _matrix_like(values: Sequence | Tensor, shape: tuple[int, ...], name: str) -> np.ndarray:
    array = _host_array(values)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} as the tokens have, got {array.shape}")
    if array.dtype.kind not in _NUMBERS:
        raise TypeError(f"{name}: expected numbers, got {array.dtype}")
    return array


def _zeros_and_ones(values: np.ndarray, name: str) -> np.ndarray:
    wrong = values[(values != 0) & (values != 1)]
    if len(wrong):
        raise ValueError(f"{name}: expected zeros and ones, got {wrong[0]}")
    return values.astype(bool)


def _flat_at_once(vectors: list) -> tuple[np.ndarray, np.ndarray] | None:
    """All vectors in one conversion, or None where they are mixed or not what a vector should be."""
    kinds = set(map(type, vectors))
    if kinds and all(issubclass(kind, Tensor) for kind in kinds):
        if len({(vector.dtype, vector.device, vector.dim()) for vector in vectors}) != 1 or vectors[0].dim() != 1:
            return None
        flat = _host_array(torch.cat(vectors))
    elif kinds == {np.ndarray}:
        if len({vector.dtype.kind for vector in vectors}) != 1 or {vector.ndim for vector in vectors} != {1}:
            return None
        flat = np.concatenate(vectors)
    elif kinds and kinds <= {list, tuple}:
        # Booleans among integers would become integers.
        if len({isinstance(vector[0], bool) for vector in vectors if len(vector)}) > 1:
            return None
        try:
            flat = np.array(list(chain.from_iterable(vectors)))
        except (TypeError, ValueError):
            return None
    else:
        return None
    lengths = np.fromiter(map(len, vectors), dtype=np.int64, count=len(vectors))
    if flat.shape != (lengths.sum(),):
        return None
    return (flat if len(flat) else flat.astype(np.int64)), lengths


__all__ = ["GivenSequences", "host_vector", "host_vectors", "inverse_of_rows", "ranges"]
