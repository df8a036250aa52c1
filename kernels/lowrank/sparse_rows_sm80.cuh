// The entries of a sparse matrix that lie in a dense block: a warp for each row, its lanes along the entries.
#pragma once

#include "kernels/common/device.h"
#include "kernels/lowrank/sparse_rows.h"

namespace pykern::lowrank {

constexpr int kSparseThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSparseThreads) sparse_rows_kernel(SparseRows params) {
  const int64_t row = int64_t{blockIdx.x} * (kSparseThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= params.rows) return;
  // A row_start that is out of range must not lead out of the entries.
  int64_t begin = params.row_start[params.first_row + row], end = params.row_start[params.first_row + row + 1];
  begin = begin < 0 ? 0 : begin;
  end = end > params.entries ? params.entries : end;
  begin = first_entry(params.column, begin, end, params.first_column);
  T* const block = static_cast<T*>(params.block) + row * params.block_stride;
  T* const values = static_cast<T*>(params.values);
  for (int64_t entry = begin + threadIdx.x % kWarpSize; entry < end; entry += kWarpSize) {
    const int64_t column = params.column[entry] - params.first_column;
    if (column < 0 || column >= params.columns) break;
    if (params.take) {
      values[entry] = block[column];
    } else {
      narrow(widen(block[column]) + widen(values[entry]), block[column]);
    }
  }
}

}  // namespace pykern::lowrank
