// Checks of the sparse rows' arguments that the CPU and the CUDA side share.
#pragma once

#include "common/checks.h"
#include "kernels/lowrank/sparse_rows.h"

namespace pykern::lowrank {

// Everything but the pointers.
inline SparseRows check_sparse_rows(const Tensor& block, const Tensor& values, const Tensor& row_start,
                                    const Tensor& column, int64_t first_row, int64_t first_column, bool take,
                                    DeviceCheck on_device) {
  on_device(block, "block");
  on_device(values, "values");
  on_device(row_start, "row_start");
  on_device(column, "column");
  check_dim(block, 2, "block");
  check_dim(values, 1, "values");
  check_dim(row_start, 1, "row_start");
  check_dim(column, 1, "column");
  SparseRows params{};
  params.type = data_type(block, "block");
  check_type(values, block.scalar_type(), "values");
  check_type(row_start, ScalarType::Long, "row_start");
  check_type(column, ScalarType::Int, "column");
  check_contiguous(values, "values");
  check_contiguous(row_start, "row_start");
  check_contiguous(column, "column");
  check_size(column, 0, values.size(0), "column");
  params.rows = block.size(0);
  params.columns = block.size(1);
  STD_TORCH_CHECK(params.columns <= 1 || block.stride(1) == 1, "block: expected unit stride along the columns");
  STD_TORCH_CHECK(first_row >= 0 && first_column >= 0 && first_row + params.rows < row_start.size(0),
                  "first_row: expected the block's rows to be rows of the matrix");
  params.first_row = first_row;
  params.first_column = first_column;
  params.block_stride = block.stride(0);
  params.entries = values.size(0);
  params.take = take;
  return params;
}

}  // namespace pykern::lowrank
