// Matrices in 8 or 4 bits on the CPU, as plain parameters. No torch header here.
#pragma once

#include "common/cpu_level.h"
#include "kernels/lowrank/affine.h"

namespace pykern::lowrank {

// What is added to the values of a dequantisation: themselves, times `factor`.
struct Blend {
  bool adds;
  double factor;
};

// A matrix on the way into a product; element (row, column) is values[row * row_stride + column * column_stride].
struct Factor {
  DataType type;  // not float64
  const void* values;
  int64_t row_stride, column_stride;
};

// W <- W - (shrink * W + step_size * left right); see kernels/lowrank/int8_weights.h.
struct Int8Step {
  int64_t rows, columns, rank;
  uint8_t* codes;
  float* scale;
  float* zero;
  Factor left, right;
  bool narrow_products;  // of factors rounded to bfloat16, where the level has them
  float shrink, step_size;
  uint64_t seed;
  uint32_t step;
};

}  // namespace pykern::lowrank

namespace pykern {

PYKERN_SIMD_FUNCTION(void, quantize_matrix, (DataType type, int bits, const lowrank::AffineMatrix& matrix))
PYKERN_SIMD_FUNCTION(void, dequantize_matrix,
                     (DataType type, int bits, const lowrank::AffineMatrix& matrix, const lowrank::Blend& blend))
// False: out of memory.
PYKERN_SIMD_FUNCTION(bool, int8_weights_step, (const lowrank::Int8Step& step))

}  // namespace pykern
