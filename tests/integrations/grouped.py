"""Grouped batches that the tests of the PrefixGrouper interface share, and attention over them by repeated prefixes."""

import torch
from torch import Tensor

GROUPS = {
    "uniform": [[6, 4, 4], [6, 4, 4]],
    "ragged": [[5, 3, 1, 7], [11, 2], [1, 4, 4]],
    "one suffix": [[7, 9]],
    "zero lengths": [[3, 0, 2, 0], [0, 4, 1], [0, 0], [2, 0]],
    "no tokens": [[0, 0], [0, 0, 0]],
    "tiles": [[70, 40, 1, 65], [9, 130, 3]],
}
PADDINGS = ["right", "left", "right mask", "left mask", "both sides", "gaps"]


def padding_mode(name: str, group_info: list[list[int]]) -> str | Tensor:
    """What the constructor takes: a side, or a mask that is wider than needed and has padding where its name says."""
    if name in ("right", "left"):
        return name
    lengths = [sum(lengths) for lengths in group_info]
    width = max(lengths) + 5
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    generator = torch.Generator().manual_seed(len(lengths))
    for row, length in enumerate(lengths):
        begin = {"right mask": 0, "left mask": width - length, "both sides": 1 + row % 4, "gaps": None}[name]
        columns = torch.randperm(width, generator=generator)[:length] if begin is None else begin + torch.arange(length)
        mask[row, columns] = True
    return mask


def scattered(lengths: list[int], seed: int = 0) -> Tensor:
    """bool [rows, longest + 3], True for as many tokens as `lengths` says, anywhere."""
    width = max(lengths) + 3
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, torch.randperm(width, generator=generator)[:length]] = True
    return mask


def masks(group_info: list[list[int]]) -> tuple[Tensor, Tensor, list[int]]:
    """prefix_mask, suffix_mask and group_sizes."""
    prefix = scattered([lengths[0] for lengths in group_info], 1)
    suffix = scattered([length for lengths in group_info for length in lengths[1:]], 2)
    return prefix, suffix, [len(lengths) - 1 for lengths in group_info]


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale=None, window=None, softcap=None, sinks=None, alibi_slopes=None
) -> Tensor:
    """One sequence: q [Hq, n, D], k [Hk, n, D], v [Hk, n, Dv] -> [Hq, n, Dv], by the formulas."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    logits = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows = torch.arange(q.shape[1])
    distance = rows[:, None] - rows[None, :]
    if alibi_slopes is not None:
        logits = logits - alibi_slopes.to(q.dtype)[:, None, None] * distance
    hidden = (distance < 0) | (distance >= (q.shape[1] + 1 if window is None else window))
    logits = logits.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.to(q.dtype)[:, None, None].expand(-1, q.shape[1], 1)
        return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1] @ v
    return logits.softmax(dim=-1) @ v


def repeated(group_info: list[list[int]], padding_mask: Tensor, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """[b, heads, seq, head size] -> [b, seq, heads, head size], each sequence of prefix and suffix computed alone."""
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]) + 0.0 * (q.sum() + k.sum() + v.sum())
    for sample, (prefix_len, *suffix_lens) in enumerate(group_info):
        columns = padding_mask[sample].nonzero().flatten()
        prefix, *suffixes = columns.split([prefix_len, *suffix_lens])
        for suffix in (columns[:0], *suffixes):
            path = torch.cat([prefix, suffix])
            result = attention(*(x[sample][:, path] for x in (q, k, v)), **options).transpose(0, 1)
            written = suffix if len(suffix) else prefix
            if len(written):
                index = (torch.tensor(sample), written)
                out = out.index_put(index, result[-len(written) :] if len(suffix) else result)
    return out


def make_inputs(shape, heads: int, key_heads: int, size: int, value_size: int, dtype: torch.dtype, seed: int = 0):
    """q, k, v as a model has them, projections seen as [b, heads, seq, head size], and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*shape, *sizes, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (randn(*sizes).transpose(1, 2) for sizes in ((heads, size), (key_heads, size), (key_heads, value_size)))
    return q, k, v, randn(heads, value_size)
