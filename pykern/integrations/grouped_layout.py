"""Where the tokens of a grouped batch lie: lengths to masks, indices and tree; tokens copied between layouts."""

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..attention import PrefixTree

_PADDING_SIDES = ("left", "right")


class Info(Sequence[int]):
    """Lengths of one sample: those of its prefix and of its suffixes, of which there is at least one.

    As a sequence, `[prefix_len, *suffix_lens]`.
    """

    def __init__(self, prefix_len: int, suffix_lens: Sequence[int]):
        self.prefix_len = prefix_len
        self.suffix_lens = list(suffix_lens)

    @property
    def num_samples(self) -> int:
        """Suffixes of the sample."""
        return len(self.suffix_lens)

    @property
    def total_len(self) -> int:
        """Tokens of the sample, its prefix counted once."""
        return self.prefix_len + sum(self.suffix_lens)

    def __getitem__(self, index):
        return [self.prefix_len, *self.suffix_lens][index]

    def __len__(self) -> int:
        return 1 + len(self.suffix_lens)

    def __repr__(self) -> str:
        return f"Info(prefix_len={self.prefix_len}, suffix_lens={self.suffix_lens})"


class GroupInfo(Sequence[Info]):
    """The lengths of a batch and all that follows from them: masks, index tensors, shapes and the prefix tree.

    A PrefixGrouper has one as `group_info`, and its properties of the same names tell what each attribute holds.
    """

    def __init__(
        self,
        info_list: Sequence[Info],
        device: torch.device | str | None = None,
        padding_mode: str | Tensor = "right",
    ):
        self.info_list = list(info_list)
        if not self.info_list:
            raise ValueError("group_info: expected at least one sample, got none")
        # Index tensors are saved for backwards, which those made in inference mode never could be.
        with torch.inference_mode(False):
            self._compute(device, padding_mode)

    @classmethod
    def from_list(
        cls,
        group_info: Sequence[Sequence[int]],
        device: torch.device | str | None = None,
        padding_mode: str | Tensor = "right",
    ) -> "GroupInfo":
        """From `[prefix length, suffix length, ...]` of each sample."""
        return cls([_read_lengths(index, lengths) for index, lengths in enumerate(group_info)], device, padding_mode)

    @property
    def batch_size(self) -> int:
        return len(self.info_list)

    def __getitem__(self, index):
        return self.info_list[index]

    def __len__(self) -> int:
        return len(self.info_list)

    def __iter__(self) -> Iterator[Info]:
        return iter(self.info_list)

    def __repr__(self) -> str:
        return repr(self.info_list)

    def tree_on(self, device: torch.device) -> PrefixTree:
        """The tree with its tensors on `device`, copied there once."""
        tree = self._trees.get(device)
        if tree is None:
            tree = self._trees[device] = self.tree.to(device)
        return tree

    def _compute(self, device: torch.device | str | None, padding_mode: str | Tensor) -> None:
        if device is None:
            device = padding_mode.device if isinstance(padding_mode, Tensor) else torch.get_default_device()

        # All of it on the host, where the lengths are, so that a GPU is never waited for.
        prefix_lens = _host_lengths(info.prefix_len for info in self)
        suffix_lens = _host_lengths(length for info in self for length in info.suffix_lens)
        total_lens = _host_lengths(info.total_len for info in self)
        padding_mask = padding_mask_of(padding_mode, total_lens)
        # How many tokens of its sample come before each, padding aside.
        rank = padding_mask.long().cumsum(dim=1) - 1
        grouped_prefix_mask = padding_mask & (rank < prefix_lens[:, None])
        grouped_suffix_mask = padding_mask & (rank >= prefix_lens[:, None])
        # Prefixes end and suffixes begin where the other is put next to them.
        ungrouped_prefix_mask = _mask(prefix_lens, "left")
        ungrouped_suffix_mask = _mask(suffix_lens, "right")
        self.sample_sizes = [info.num_samples for info in self]
        suffix_attn_mask = torch.cat(
            [repeat_rows(ungrouped_prefix_mask, self.sample_sizes), ungrouped_suffix_mask], dim=1
        )

        self.prefix_lens = prefix_lens.to(device)
        self.grouped_suffix_lens = (total_lens - prefix_lens).to(device)
        self.ungrouped_suffix_lens = suffix_lens.to(device)
        self.num_samples = _host_lengths(self.sample_sizes).to(device)
        self.total_lens = total_lens.to(device)
        self.padding_mask = padding_mask.to(device)
        self.grouped_prefix_mask = grouped_prefix_mask.to(device)
        self.grouped_suffix_mask = grouped_suffix_mask.to(device)
        self.ungrouped_prefix_mask = self.prefix_attn_mask = ungrouped_prefix_mask.to(device)
        self.ungrouped_suffix_mask = ungrouped_suffix_mask.to(device)
        self.suffix_attn_mask = suffix_attn_mask.to(device)
        self.grouped_prefix_indices = grouped_prefix_mask.nonzero().to(device)
        self.grouped_suffix_indices = grouped_suffix_mask.nonzero().to(device)
        self.ungrouped_prefix_indices = ungrouped_prefix_mask.nonzero().to(device)
        self.ungrouped_suffix_indices = ungrouped_suffix_mask.nonzero().to(device)
        self.x_shape = padding_mask.shape
        self.prefix_x_shape = ungrouped_prefix_mask.shape
        self.suffix_x_shape = ungrouped_suffix_mask.shape

        packed = PrefixTree.from_groups([info.prefix_len for info in self], [info.suffix_lens for info in self])
        rows = padding_mask.flatten().nonzero().flatten()
        position = torch.zeros(padding_mask.numel(), dtype=torch.int32, device="cpu")
        position[rows] = packed.position
        self.position_ids = position.long().view(self.x_shape).to(device)
        self.token_rows = None
        if len(rows) == len(position):
            tree = packed
        elif _together(rows, self.x_shape[1]):
            # The padded batch is a tree itself: padding before and behind a sample is in no token's subtree.
            subtree_end = torch.arange(len(position), dtype=torch.int32, device="cpu")
            subtree_end[rows] = rows[packed.subtree_end.long() - 1].to(torch.int32) + 1
            tree = PrefixTree(subtree_end, position)
        else:
            # Padding inside of a subtree would see the tokens before it.
            tree = packed
            self.token_rows = rows.to(device)
        self.tree = tree.to(device)
        self._trees = {self.tree.subtree_end.device: self.tree}


# --- tokens ---------------------------------------------------------------------------------------


class CopyTokens(torch.autograd.Function):
    """Zeros of shape [*shape, ...], into which tokens of each of `tensors` [tokens, ...] are copied.

    sources, targets: for each tensor, int64 indices of its tokens and of those of the result, counted through all of
    `shape`, without repeats; None for all of them.
    """

    @staticmethod
    def forward(ctx, shape, sources, targets, *tensors):
        ctx.save_for_backward(*sources, *targets)
        ctx.shapes, ctx.dimensions = [x.shape for x in tensors], len(shape)
        out = tensors[0].new_zeros(*shape, *tensors[0].shape[1:])
        tokens = out.flatten(0, len(shape) - 1)
        for source, target, x in zip(sources, targets, tensors, strict=True):
            x = x if source is None else x.index_select(0, source)
            if target is None:
                tokens.copy_(x)
            else:
                tokens.index_copy_(0, target, x)
        return out

    @staticmethod
    def backward(ctx, grad):
        indices = ctx.saved_tensors
        sources, targets = indices[: len(ctx.shapes)], indices[len(ctx.shapes) :]
        grad = grad.flatten(0, ctx.dimensions - 1)
        grads = [
            CopyTokens.apply(shape[:1], (target,), (source,), grad) if needed else None
            for shape, source, target, needed in zip(
                ctx.shapes, sources, targets, ctx.needs_input_grad[3:], strict=True
            )
        ]
        return None, None, None, *grads


def copy_tokens(shape: Sequence[int], *copies: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Zeros [*shape, ...], two dimensions of tokens, into which tokens of tensors [rows, columns, ...] are copied.

    copies: (tensor, indices of it, indices of the result), the indices int64 [tokens, 2], on any device.
    """
    device = copies[0][0].device
    tensors, sources, targets = [], [], []
    for x, source, target in copies:
        tensors.append(x.flatten(0, 1))
        sources.append(_flat(source.to(device), x.shape[1]))
        targets.append(_flat(target.to(device), shape[1]))
    return CopyTokens.apply(tuple(shape), tuple(sources), tuple(targets), *tensors)


def _flat(indices: Tensor, columns: int) -> Tensor:
    return indices[:, 0] * columns + indices[:, 1]


def repeat_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Row i of `x`, counts[i] times. Its gradient, unlike that of indexing on a GPU, is a sum in a fixed order."""
    return torch.cat([row.expand(count, *x.shape[1:]) for row, count in zip(x.split(1), counts, strict=True)])


def _read_lengths(index: int, lengths: Sequence[int]) -> Info:
    try:
        values = [operator.index(length) for length in lengths]
    except TypeError:
        raise TypeError(
            f"group_info[{index}]: expected integers [prefix length, suffix length, ...], got {lengths!r}"
        ) from None
    if len(values) < 2:
        raise ValueError(
            f"group_info[{index}]: expected [prefix length, suffix length, ...] with at least one suffix, got {values}"
        )
    if min(values) < 0:
        raise ValueError(f"group_info[{index}]: expected lengths of at least 0, got {values}")
    return Info(values[0], values[1:])


def _host_lengths(lengths) -> Tensor:
    return torch.tensor(list(lengths), dtype=torch.int64, device="cpu")


def _mask(lengths: Tensor, side: str) -> Tensor:
    """bool [rows, longest], padded on `side`."""
    longest = int(lengths.max()) if len(lengths) else 0
    columns = torch.arange(longest, device="cpu")
    return columns >= longest - lengths[:, None] if side == "left" else columns < lengths[:, None]


def padding_mask_of(padding_mode: str | Tensor, lengths: Tensor) -> Tensor:
    """bool [rows, columns] on the host, with `lengths` tokens in its rows."""
    if isinstance(padding_mode, str):
        if padding_mode not in _PADDING_SIDES:
            raise ValueError(f'padding_mode: expected "left", "right" or a mask tensor, got {padding_mode!r}')
        return _mask(lengths, padding_mode)
    check_mask("padding_mode", padding_mode)
    if padding_mode.shape[0] != len(lengths):
        raise ValueError(f"padding_mode: expected a mask of {len(lengths)} rows, got {padding_mode.shape[0]}")
    mask = padding_mode.cpu() != 0
    counts = mask.sum(dim=1)
    if not torch.equal(counts, lengths):
        raise ValueError(f"padding_mode: expected rows of {lengths.tolist()} tokens, got {counts.tolist()}")
    return mask


def _together(rows: Tensor, columns: int) -> bool:
    """Whether the tokens of each sample follow one another, without padding between them."""
    same_sample = rows[1:] // columns == rows[:-1] // columns
    return bool((rows.diff()[same_sample] == 1).all())


def count_tokens(mask: Tensor) -> Tensor:
    return (mask != 0).sum(dim=1)


def check_mask(name: str, mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}")
    if mask.dim() != 2:
        raise ValueError(f"{name}: expected two dimensions [rows, tokens], got shape {tuple(mask.shape)}")


def check_tokens(name: str, x: Tensor, shape: Sequence[int], what: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() < 2 or tuple(x.shape[:2]) != tuple(shape):
        raise ValueError(
            f"{name}: expected [{shape[0]}, {shape[1]}, ...], the shape of {what}, got shape {tuple(x.shape)}"
        )
