"""The prefix tree: which token sees which, as two int32 tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .host import host_vector, host_vectors
from .tiles import tree_tiles
from .trie import SortedSequences, TrieRows

_INT32_MAX = 2**31 - 1
_FARTHEST = 2**30  # Kernels take differences of positions in int32.


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Packed tokens of many sequences, every shared prefix stored once.

    Tokens lie in depth-first order of their prefix tree (or forest): a token, then all that follows it.

    subtree_end: int32 [T]. One past the last token of the subtree of token j, so **key j is visible to query i
        iff j <= i < subtree_end[j]**. `subtree_end[j] == j` makes j a padding token that no query sees.
    position: int32 [T], the number of tokens before j on its own path: the position for rotary embeddings, and
        the distance that windows count. Computed if left out.

    The constructor checks that the intervals nest (ValueError otherwise), which needs the values on the host;
    the class methods build trees that do. Both tensors are plain: they can be saved for a checkpointed backward,
    sent between pipeline stages and passed to `prefix_attention` as a tuple instead of the tree.
    """

    subtree_end: Tensor
    position: Tensor = None  # type: ignore[assignment]

    # What is made in inference mode could never be saved for a backward.
    @torch.inference_mode(False)
    def __post_init__(self):
        ends = _int32_vector(self.subtree_end, "subtree_end")
        host = ends.cpu().numpy().astype(np.int64)
        _check_nested(host)
        depth = _depths(host)
        if self.position is None:
            position = torch.from_numpy(depth.astype(np.int32)).to(ends.device)
        else:
            position = _int32_vector(self.position, "position")
            if position.shape != ends.shape or position.device != ends.device:
                raise ValueError(
                    f"position: expected shape {tuple(ends.shape)} on {ends.device} as subtree_end has, got "
                    f"{tuple(position.shape)} on {position.device}; leave it out to have it computed"
                )
            given = position.cpu().numpy()
            wrong = np.flatnonzero((given != depth) & (host > np.arange(len(host))))
            if len(wrong):
                raise ValueError(
                    f"position: expected {depth[wrong[0]]} ancestors for token {wrong[0]}, got {given[wrong[0]]}; "
                    "leave it out to have it computed"
                )
            far = np.flatnonzero((given != depth) & (np.abs(given.astype(np.int64)) > _FARTHEST))
            if len(far):
                raise ValueError(
                    f"position: expected at most {_FARTHEST} for padding too, got {given[far[0]]} for token {far[0]}; "
                    "leave it out to have it computed"
                )
        object.__setattr__(self, "subtree_end", ends)
        object.__setattr__(self, "position", position)
        object.__setattr__(self, "_last_rows", None)
        self._set_tiles(*tree_tiles(ends, position))

    # --- constructors -----------------------------------------------------------------------------

    @classmethod
    def _trusted(cls, ends: np.ndarray, position: np.ndarray, last_rows: np.ndarray) -> "PrefixTree":
        """A tree whose arrays nest by construction. last_rows: the last row of every original sequence, -1 if empty."""
        if len(ends) > _INT32_MAX:
            raise ValueError(f"tree: expected at most {_INT32_MAX} tokens, got {len(ends)}; split the batch")
        tree = object.__new__(cls)
        with torch.inference_mode(False):
            object.__setattr__(tree, "subtree_end", torch.from_numpy(ends.astype(np.int32)))
            object.__setattr__(tree, "position", torch.from_numpy(position.astype(np.int32)))
            object.__setattr__(tree, "_last_rows", last_rows)
            tree._set_tiles(*tree_tiles(tree.subtree_end, tree.position))
        return tree

    def _set_tiles(self, bounds: Tensor, order: Tensor) -> None:
        object.__setattr__(self, "bounds", bounds)
        object.__setattr__(self, "order", order)

    @classmethod
    def from_groups(cls, prefix_lens: Sequence[int], response_lens: Sequence[Sequence[int]]) -> "PrefixTree":
        """A forest of depth two: prompts, each with its responses.

        prefix_lens: P lengths. response_lens: P lists of lengths; lists may be empty and lengths zero.
        Rows: prompt 0, its responses, prompt 1, its responses, ... One sequence per response (its prompt and itself);
        a prompt without responses is a sequence of its own.
        """
        if len(prefix_lens) != len(response_lens):
            raise ValueError(
                f"response_lens: expected a list for each of the {len(prefix_lens)} prompts, "
                f"got {len(response_lens)} lists"
            )
        lengths: list[int] = []
        parents: list[int] = []
        for prefix, responses in zip(prefix_lens, response_lens, strict=True):
            root = len(lengths)
            lengths.append(prefix)
            lengths.extend(responses)
            parents.append(-1)
            parents.extend([root] * len(responses))
        return cls.from_parents(lengths, parents)

    @classmethod
    def from_parents(cls, lengths: Sequence[int], parents: Sequence[int]) -> "PrefixTree":
        """A tree of any depth from its nodes.

        lengths: tokens of each node, zero allowed. parents: the index of each node's parent, -1 for a root.
        Rows follow depth-first order, children of one node in the order of their indices: where every node comes
        right after its parent or an earlier sibling's subtree, rows are the nodes in the order given.
        One sequence per node without children, in the order of nodes.
        """
        sizes = host_vector(lengths, "lengths")
        above = host_vector(parents, "parents")
        nodes = len(sizes)
        if len(above) != nodes:
            raise ValueError(f"parents: expected one for each of the {nodes} nodes, got {len(above)}")
        if nodes and sizes.min() < 0:
            raise ValueError(f"lengths: expected lengths >= 0, got {sizes.min()} for node {sizes.argmin()}")
        if nodes and not ((above >= -1) & (above < nodes)).all():
            wrong = np.flatnonzero((above < -1) | (above >= nodes))[0]
            raise ValueError(
                f"parents: expected -1 (a root) or a node below {nodes}, got {above[wrong]} for node {wrong}"
            )

        order = _depth_first(above)
        # Subtree sizes, children before parents; then each node's first row, parents before children.
        parent_list, size_list = above.tolist(), sizes.tolist()
        subtree = list(size_list)
        for node in reversed(order):
            if parent_list[node] >= 0:
                subtree[parent_list[node]] += subtree[node]
        starts = np.zeros(nodes, dtype=np.int64)
        depth = np.zeros(nodes, dtype=np.int64)
        row_order = np.asarray(order, dtype=np.int64)
        starts[row_order] = np.cumsum(sizes[row_order]) - sizes[row_order]
        depth_list = [0] * nodes
        for node in order:
            parent = parent_list[node]
            depth_list[node] = depth_list[parent] + size_list[parent] if parent >= 0 else 0
        depth[:] = depth_list

        ordered_sizes = sizes[row_order]
        ends = np.repeat((starts + np.asarray(subtree, dtype=np.int64))[row_order], ordered_sizes)
        within = np.arange(len(ends)) - np.repeat(starts[row_order], ordered_sizes)
        position = np.repeat(depth[row_order], ordered_sizes) + within

        # A sequence ends in the last row of its leaf, or of the nearest ancestor that has rows.
        leaf = np.ones(nodes, dtype=bool)
        leaf[above[above >= 0]] = False
        last_list = [-1] * nodes
        start_list = starts.tolist()
        for node in order:
            if size_list[node]:
                last_list[node] = start_list[node] + size_list[node] - 1
            elif parent_list[node] >= 0:
                last_list[node] = last_list[parent_list[node]]
        return cls._trusted(ends, position, np.asarray(last_list, dtype=np.int64)[leaf])

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int] | Tensor]) -> tuple["PrefixTree", Tensor]:
        """The token trie of the sequences: prefixes that any of them share are stored once, duplicates too.

        sequences: token ids, 1-D each, any integer type; empty ones allowed.
        Returns the tree, whose sequences are the given ones in the given order, and the packed token ids, int64 [T].
        Siblings lie in the order of their token ids.
        """
        flat, lengths = host_vectors(sequences, "sequences")
        starts = np.cumsum(lengths) - lengths
        return cls._from_trie(SortedSequences.of(flat, starts, lengths).rows(), lengths)

    @classmethod
    def _from_trie(cls, rows: TrieRows, lengths: np.ndarray) -> tuple["PrefixTree", Tensor]:
        """The tree of a trie's rows, and their tokens. lengths: of the sequences, in the order given."""
        tree = cls._trusted(rows.subtree_end, rows.position, rows.last_rows)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        # The rows of the sequences are at hand; later they would have to be gathered from the tree.
        with torch.inference_mode(False):
            maps = torch.from_numpy(rows.sequence_rows), torch.from_numpy(cu_seqlens.astype(np.int32))
            object.__setattr__(tree, "_sequences", maps)
            return tree, torch.from_numpy(rows.tokens)

    # --- what it holds ------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """T, rows of the packed batch."""
        return self.subtree_end.shape[0]

    @property
    def num_sequences(self) -> int:
        """Original sequences that the tree packs."""
        return len(self._sequences[1]) - 1

    @property
    def sequence_rows(self) -> Tensor:
        """int64 [sum of lengths]: the packed row of every token of every original sequence, one after the other.

        `packed[tree.sequence_rows]` unpacks; `cu_seqlens` says where each sequence begins.
        A tree made from tensors has one sequence per token without descendants.
        """
        return self._sequences[0].to(self.subtree_end.device)

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [sequences + 1]: sequence s is `sequence_rows[cu_seqlens[s] : cu_seqlens[s + 1]]`."""
        return self._sequences[1].to(self.subtree_end.device)

    @cached_property
    @torch.inference_mode(False)
    def _sequences(self) -> tuple[Tensor, Tensor]:
        ends = self.subtree_end.cpu().numpy().astype(np.int64)
        rows = np.arange(len(ends))
        last = self._last_rows
        if last is None:
            last = np.flatnonzero(ends == rows + 1)
        # Nodes: runs of tokens that are one another's only child, so that they have one end.
        first, parent_row = _runs(ends)
        node_of = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(ends))))
        depth = _depths(ends)
        lengths = np.where(last >= 0, depth[last] + 1, 0) if len(ends) else np.zeros(len(last), dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        result = np.empty(offsets[-1], dtype=np.int64)
        active = np.flatnonzero(last >= 0)
        tip = last[active]
        while len(active):
            node = node_of[tip]
            count = tip - first[node] + 1
            begin = offsets[active] + depth[first[node]]
            step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            result[np.repeat(begin, count) + step] = np.repeat(first[node], count) + step
            tip = parent_row[node]
            active, tip = active[tip >= 0], tip[tip >= 0]
        return torch.from_numpy(result), torch.from_numpy(offsets.astype(np.int32))

    @cached_property
    def visible_pairs(self) -> int:
        """Query-key pairs that see each other: the sum of subtree_end[j] - j."""
        ends = self.subtree_end.cpu().to(torch.int64)
        return int((ends - torch.arange(len(ends), device="cpu")).clamp(min=0).sum())

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(subtree_end, position, bounds, order): all that `prefix_attention` reads of a tree, as plain tensors.

        `bounds` and `order` (see `pykern.attention.tiles.tree_tiles`) tell kernels what to skip and where to begin.
        They are made once, with the tree, and serve every layer, the forward and the backward.
        """
        return self.subtree_end, self.position, self.bounds, self.order

    def flops(self, num_heads: int, head_dim: int, value_dim: int | None = None, *, backward: bool = False) -> int:
        """Floating-point operations of `prefix_attention` on this tree, visible pairs only.

        The forward's two products, and with `backward` the five of the backward besides.
        """
        value_dim = head_dim if value_dim is None else value_dim
        products = head_dim + value_dim
        if backward:
            products += 3 * head_dim + 2 * value_dim
        return 2 * num_heads * self.visible_pairs * products

    def to(self, device: torch.device | str) -> "PrefixTree":
        """The same tree with its tensors on `device`."""
        device = torch.device(device)
        if device == self.subtree_end.device:
            return self
        tree = object.__new__(PrefixTree)
        with torch.inference_mode(False):
            subtree_end, position, bounds, order = (tensor.to(device) for tensor in self.tensors)
        object.__setattr__(tree, "subtree_end", subtree_end)
        object.__setattr__(tree, "position", position)
        object.__setattr__(tree, "_last_rows", self._last_rows)
        if "_sequences" in self.__dict__:
            object.__setattr__(tree, "_sequences", self._sequences)
        tree._set_tiles(bounds, order)
        return tree


def _int32_vector(tensor: Tensor, name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name}: expected an int32 tensor, got {type(tensor).__name__}; use torch.tensor(..., dtype=torch.int32)"
        )
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {tensor.dtype}; use .to(torch.int32)")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(tensor.shape)}")
    return tensor.contiguous().clone() if tensor.is_inference() else tensor.contiguous()


def _depth_first(parents: np.ndarray) -> list[int]:
    """Nodes in depth-first order, children in the order of their indices."""
    nodes = len(parents)
    if (parents < np.arange(nodes)).all() and _is_depth_first(parents):
        return list(range(nodes))
    grouped = np.argsort(parents, kind="stable").tolist()
    bounds = np.searchsorted(parents[grouped], np.arange(-1, nodes + 1)).tolist()
    order: list[int] = []
    waiting = grouped[bounds[0] : bounds[1]][::-1]
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting.extend(grouped[bounds[node + 1] : bounds[node + 2]][::-1])
    if len(order) != nodes:
        missing = sorted(set(range(nodes)) - set(order))[0]
        raise ValueError(f"parents: expected every node to lead to a root, but node {missing} is its own ancestor")
    return order


def _is_depth_first(parents: np.ndarray) -> bool:
    path: list[int] = []
    for node, parent in enumerate(parents.tolist()):
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            return False
        path.append(node)
    return True


def _depths(ends: np.ndarray) -> np.ndarray:
    """Proper ancestors of every token: the intervals that hold it and began before it."""
    count = len(ends)
    rows = np.arange(count)
    real = ends > rows
    change = np.zeros(count + 2, dtype=np.int64)
    change[1 : count + 1] += real
    # A token without descendants opens and closes at once.
    np.add.at(change, ends[real], -1)
    return np.cumsum(change)[:count]


def _check_nested(ends: np.ndarray) -> None:
    count = len(ends)
    rows = np.arange(count)
    wrong = np.flatnonzero((ends < rows) | (ends > count))
    if len(wrong):
        token = wrong[0]
        raise ValueError(
            f"subtree_end: expected {token} (padding) to {count} for token {token}, got {ends[token]}; "
            "it is one past the last token of the subtree"
        )
    real = np.flatnonzero(ends > rows)
    if not len(real):
        return
    # Neighbours with one end are a chain, so only the first of each run can cross an open interval.
    firsts = real[np.flatnonzero(np.diff(ends[real], prepend=-1))]
    open_ends: list[int] = []
    for row, end in zip(firsts.tolist(), ends[firsts].tolist(), strict=True):
        while open_ends and open_ends[-1] <= row:
            open_ends.pop()
        if open_ends and end > open_ends[-1]:
            raise ValueError(
                f"subtree_end: expected nested subtrees, but that of token {row} ends at {end}, beyond "
                f"{open_ends[-1]} where a subtree around it ends; put the tokens in depth-first order"
            )
        open_ends.append(end)


def _runs(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row and parent row (-1 for none) of every maximal run of tokens that follow one another on a path."""
    rows = np.arange(len(ends))
    if not len(ends):
        return rows, rows
    chained = (ends[1:] == ends[:-1]) & (ends[:-1] > rows[1:])
    first = np.flatnonzero(np.concatenate([[True], ~chained]))
    last = np.append(first[1:], len(ends)) - 1
    parent = np.full(len(first), -1, dtype=np.int64)
    path: list[tuple[int, int]] = []
    for node, (row, end, tip) in enumerate(zip(first.tolist(), ends[first].tolist(), last.tolist(), strict=True)):
        while path and path[-1][0] <= row:
            path.pop()
        if path:
            parent[node] = path[-1][1]
        if end > row:
            path.append((end, tip))
    return first, parent


__all__ = ["PrefixTree"]
