// Gathering rows of a matrix, and the sum of gradients that belongs to it.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// out[n] = source[rows[n]] for rows of `row_bytes`. A row outside [0, source_rows) becomes NaN, all bits set.
struct GatherRows {
  const void* source;
  const int64_t* rows;
  void* out;  // rows close together
  int64_t source_rows, out_rows;
  int64_t row_bytes, source_stride;  // in bytes
};

// grad_source[s] = sum over order[offsets[s] : offsets[s + 1]], in that order, of grad_out[n]. What lies outside
// [0, out_rows) is left out.
struct GatherRowsBackward {
  DataType type;
  const void* grad_out;
  const int64_t* order;    // [out_rows]
  const int64_t* offsets;  // [source_rows + 1]
  void* grad_source;       // rows close together
  int64_t source_rows, out_rows, columns, grad_stride;
};

const char* launch_gather_rows(const GatherRows& params, Stream stream);
const char* launch_gather_rows_backward(const GatherRowsBackward& params, Stream stream);

}  // namespace pykern
