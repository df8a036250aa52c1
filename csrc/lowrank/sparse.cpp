// Host side of the sparse rows on the CPU.
#include <torch/csrc/stable/library.h>

#include "lowrank/sparse_arguments.h"
#include "lowrank/sparse_rows.h"

namespace pykern {
namespace {

void run(lowrank::SparseRows rows, const Tensor& block, const Tensor& values, const Tensor& row_start,
         const Tensor& column) {
  // The one that is only read is not marked as written.
  rows.block = rows.take ? const_cast<void*>(block.const_data_ptr()) : block.mutable_data_ptr();
  rows.values = rows.take ? values.mutable_data_ptr() : const_cast<void*>(values.const_data_ptr());
  rows.row_start = input<int64_t>(row_start);
  rows.column = input<int32_t>(column);
  sparse_rows()(rows);
}

void add(const Tensor& block, const Tensor& values, const Tensor& row_start, const Tensor& column, int64_t first_row,
         int64_t first_column) {
  run(lowrank::check_sparse_rows(block, values, row_start, column, first_row, first_column, false, check_cpu), block,
      values, row_start, column);
}

void take(const Tensor& block, const Tensor& row_start, const Tensor& column, const Tensor& values, int64_t first_row,
          int64_t first_column) {
  run(lowrank::check_sparse_rows(block, values, row_start, column, first_row, first_column, true, check_cpu), block,
      values, row_start, column);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("sparse_rows_add", TORCH_BOX(&add));
  m.impl("sparse_rows_take", TORCH_BOX(&take));
}

}  // namespace pykern
