// The step of weights that are kept in 8 bits (affine.h), a block of rows at a time, as plain parameters.
#pragma once

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern::lowrank {

// Every group is dequantised, w <- w - (shrink * w + step_size * update), and quantised anew with the range of its new
// values and stochastic rounding. An element's random number is word index % 4 of philox(seed, index / 4, step), where
// index counts the elements of the whole matrix row by row.
struct Int8WeightParams {
  int64_t rows, columns;  // of this block
  int64_t first_row;      // of this block in the matrix
  uint8_t* codes;         // of the block, as scale and zero
  float* scale;
  float* zero;
  const float* update;  // without gaps
  uint64_t seed;
  const void* step;
  bool step_is_double;
  const void* lr;
  bool lr_is_double;
  const double* step_factor;
  const float* found_inf;  // null, or not zero: nothing changes
  double factor, weight_decay;
  bool decay_after;
};

const char* launch_int8_weights(const Int8WeightParams& params, Stream stream);

}  // namespace pykern::lowrank
