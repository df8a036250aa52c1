"""The rows of all ranks on every rank, by one collective."""

import math

import torch
from torch import Tensor, distributed

from .estimators import METRICS


class GatheredRows:
    """Columns of equally many rows, [N] or [N, K], gathered from the ranks of a group: rank after rank, as bytes of one
    buffer, so that what is computed from them has the same bits as in one process.

    Every rank must have the same number of rows, or all give the same `max_rows`: then shorter ranks are padded, a row
    in front tells how many are not, and padding gets NaN for a number and another row's value for an integer, so that
    it makes no group of its own. No host waits for any of it.
    """

    def __init__(self, rows: int, group: "distributed.ProcessGroup", max_rows: int | None) -> None:
        if max_rows is not None and max_rows < rows:
            raise ValueError(f"max_rows: expected at least this rank's {rows} rows, got {max_rows}")
        self.rows = rows
        self.block = rows if max_rows is None else max_rows
        self.padded = max_rows is not None
        self.group = group
        self.ranks = distributed.get_world_size(group)
        self.rank = distributed.get_rank(group)
        self.valid: Tensor | None = None
        """bool [ranks * max_rows]; None without max_rows."""

    def gather(self, columns: list[Tensor | None]) -> list[Tensor | None]:
        """The columns of all ranks."""
        wide = [None if c is None else (c if c.dim() == 2 else c.unsqueeze(1)).contiguous() for c in columns]
        present = [column.view(torch.uint8) for column in wide if column is not None]
        buffer = torch.cat(present, dim=1)
        width = buffer.shape[1]
        if self.padded:
            padded = buffer.new_zeros(1 + self.block, width)
            padded[0, :8] = torch.full((1,), self.rows, dtype=torch.int64, device=buffer.device).view(torch.uint8)
            padded[1 : 1 + self.rows] = buffer
            buffer = padded
        gathered = buffer.new_empty(self.ranks * buffer.shape[0], width)
        distributed.all_gather_into_tensor(gathered, buffer, group=self.group)
        gathered = gathered.view(self.ranks, buffer.shape[0], width)
        if self.padded:
            counts = gathered[:, 0, :8].contiguous().view(torch.int64)
            self.valid = (torch.arange(self.block, device=buffer.device) < counts).flatten()
            gathered = gathered[:, 1:]
        results, first = [], 0
        for column, whole in zip(columns, wide):
            if column is None:
                results.append(None)
                continue
            last = first + whole.shape[1] * whole.element_size()
            # A copy, also where the slice is in one piece: of a single row, where it may begin between two numbers.
            part = gathered[:, :, first:last].clone(memory_format=torch.contiguous_format)
            values = part.view(whole.dtype).flatten(0, 1)
            results.append(self._without_padding(values if column.dim() == 2 else values.squeeze(1)))
            first = last
        return results

    def _without_padding(self, values: Tensor) -> Tensor:
        if self.valid is None or len(values) == 0:
            return values
        valid = self.valid if values.dim() == 1 else self.valid.unsqueeze(1)
        if values.is_floating_point():
            return values.masked_fill(~valid, math.nan)
        some_row = self.valid.to(torch.int8).argmax().view(1)
        return torch.where(valid, values, values.index_select(0, some_row))

    def apart(self, ids: Tensor) -> Tensor:
        """The ids, with one for the padding that no row has: for what counts rows whatever their rewards are."""
        if self.valid is None or len(ids) == 0:
            return ids
        low, high = ids.aminmax()
        unused = torch.where(low > torch.iinfo(ids.dtype).min, low - 1, high + 1)
        return torch.where(self.valid, ids, unused)

    def own(self, values: Tensor) -> Tensor:
        """This rank's rows of a result."""
        return values.narrow(0, self.rank * self.block, self.rows)

    def without_padding(self, counts: Tensor) -> Tensor:
        """The counts of METRICS less those of the padding: rows that are not finite, and one group if that is all."""
        if self.valid is None or self.valid.numel() == 0:
            return counts
        padding = (~self.valid).sum()
        groups = (padding == self.valid.numel()).to(torch.int64)
        none = torch.zeros_like(padding)
        return counts - torch.stack([{"non_finite": padding, "groups": groups}.get(name, none) for name in METRICS])
