// Matrices in 8 or 4 bits a value, quantised group by group, as plain parameters.
//
// A group is kAffineGroup neighbours in one row (the last of a row may be shorter). It has a float32 `zero`, its
// smallest value, and a float32 `scale`, its range over the largest code; a value is zero + scale * code. With a zero
// that is a value and no code, a group that lies off zero keeps all its levels, and one of equal values is exact. A
// group with a value that is not finite becomes NaN. Codes of 4 bits lie two to a byte, the even column in the low
// half; a row begins at a byte of its own.
#pragma once

#include "kernels/common/host_device.h"
#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern::lowrank {

constexpr int kAffineGroup = 256;

PYKERN_HOST_DEVICE int64_t affine_groups(int64_t columns) { return (columns + kAffineGroup - 1) / kAffineGroup; }
PYKERN_HOST_DEVICE int64_t code_bytes(int64_t columns, int bits) { return bits == 8 ? columns : (columns + 1) / 2; }
PYKERN_HOST_DEVICE float largest_code(int bits) { return bits == 8 ? 255.0f : 15.0f; }

struct AffineMatrix {
  void* values;  // read by a quantisation, written by its inverse
  int64_t rows, columns, row_stride, column_stride;
  uint8_t* codes;  // [rows, code_bytes(columns)], as scale and zero [rows, affine_groups(columns)] without gaps
  float* scale;
  float* zero;
};

struct AffineParams {
  DataType type;            // of the values
  int bits;                 // 8 or 4
  const float* found_inf;   // null, or not zero: nothing is quantised
  bool adds;                // values = sign * values / grad_scale + what the codes say; else what the codes say
  float sign;
  const float* grad_scale;  // null: 1
};

// A few launches for all matrices; those without elements are left out.
const char* launch_quantize_groups(const AffineParams& params, const AffineMatrix* matrices, int64_t count,
                                   Stream stream);
const char* launch_dequantize_groups(const AffineParams& params, const AffineMatrix* matrices, int64_t count,
                                     Stream stream);

}  // namespace pykern::lowrank
