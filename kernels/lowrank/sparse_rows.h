// A sparse matrix in compressed rows against a dense block of it, as plain parameters.
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"
#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern::lowrank {

// Entry e of row r lies at column[e], row_start[r] <= e < row_start[r + 1], the columns of a row ascending. The block
// is [rows, columns] and begins at (first_row, first_column) of the matrix; entries outside of it are left alone.
struct SparseRows {
  DataType type;  // of block and values
  int64_t rows, columns;
  int64_t first_row, first_column;
  void* block;
  int64_t block_stride;
  void* values;
  int64_t entries;
  const int64_t* row_start;  // of the whole matrix
  const int32_t* column;
  bool take;  // values = block, else block += values
};

// The first entry of [begin, end) whose column is not below `column`.
PYKERN_HOST_DEVICE int64_t first_entry(const int32_t* columns, int64_t begin, int64_t end, int64_t column) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (columns[middle] < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

const char* launch_sparse_rows(const SparseRows& params, Stream stream);

}  // namespace pykern::lowrank
