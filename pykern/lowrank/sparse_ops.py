"""The raw ops on sparse rows and their fake kernels.

A sparse matrix in compressed rows (values [entries] in a float type, row_start int64 [rows + 1], column int32
[entries], ascending within a row) meets a dense block [height, width] of it, which begins at (first_row, first_column)
and has unit stride along its rows.

sparse_rows_add(block!, values, row_start, column, *, first_row, first_column): block += the entries that lie in it.
sparse_rows_take(block, row_start, column, values!, *, first_row, first_column): those entries = block; others stay.
"""

import torch

from .. import _native  # noqa: F401 (loads the library that defines the ops)

sparse_rows_add = torch.ops.pykern.sparse_rows_add.default
sparse_rows_take = torch.ops.pykern.sparse_rows_take.default


@torch.library.register_fake("pykern::sparse_rows_add")
def _(block, values, row_start, column, *, first_row, first_column):
    return None


@torch.library.register_fake("pykern::sparse_rows_take")
def _(block, row_start, column, values, *, first_row, first_column):
    return None
