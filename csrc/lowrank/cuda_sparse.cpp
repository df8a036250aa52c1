// Host side of the sparse rows on CUDA.
#include "common/cuda.h"
#include "lowrank/sparse_arguments.h"

namespace pykern {
namespace {

void run(lowrank::SparseRows params, const Tensor& block, const Tensor& values, const Tensor& row_start,
         const Tensor& column, const char* op) {
  if (params.rows == 0 || params.columns == 0 || params.entries == 0) return;
  const cuda::DeviceGuard guard(block);
  const Stream stream = cuda::current_stream(block);
  params.block = params.take ? const_cast<void*>(cuda::input(block)) : cuda::output(block);
  params.values = params.take ? cuda::output(values) : const_cast<void*>(cuda::input(values));
  params.row_start = cuda::input<int64_t>(row_start);
  params.column = cuda::input<int32_t>(column);
  cuda::check_launch(lowrank::launch_sparse_rows(params, stream), op);
}

void add(const Tensor& block, const Tensor& values, const Tensor& row_start, const Tensor& column, int64_t first_row,
         int64_t first_column) {
  run(lowrank::check_sparse_rows(block, values, row_start, column, first_row, first_column, false, cuda::check_device),
      block, values, row_start, column, "sparse_rows_add");
}

void take(const Tensor& block, const Tensor& row_start, const Tensor& column, const Tensor& values, int64_t first_row,
          int64_t first_column) {
  run(lowrank::check_sparse_rows(block, values, row_start, column, first_row, first_column, true, cuda::check_device),
      block, values, row_start, column, "sparse_rows_take");
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("sparse_rows_add", TORCH_BOX(&add));
  m.impl("sparse_rows_take", TORCH_BOX(&take));
}

}  // namespace pykern
