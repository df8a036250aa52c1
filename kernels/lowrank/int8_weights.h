// The step of weights that are kept in 8 bits (affine.h), a block of rows at a time, as plain parameters.
#pragma once

#include "kernels/common/host_device.h"
#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern::lowrank {

// The random number of an element, in (0, 1), from its sixteen bits; its mean is 1 / 2.
PYKERN_HOST_DEVICE float random_share(uint32_t bits) { return (static_cast<float>(bits) + 0.5f) * (1.0f / 65536.0f); }

// Every group is dequantised, w <- w - (shrink * w + step_size * update), and quantised anew with the range of its new
// values and stochastic rounding, whose bits are those of kernels/common/philox.h; elements are counted through the
// rows of the whole matrix.
struct Int8WeightParams {
  int64_t rows, columns;  // of this block
  int64_t first_row;      // of this block in the matrix
  uint8_t* codes;         // of the block, as scale and zero
  float* scale;
  float* zero;
  const float* update;  // without gaps
  uint64_t seed;
  const float* step;
  const void* lr;
  bool lr_is_double;
  const double* step_factor;
  const float* found_inf;  // null, or not zero: nothing changes
  double factor, weight_decay;
  bool decay_after;
};

const char* launch_int8_weights(const Int8WeightParams& params, Stream stream);

}  // namespace pykern::lowrank
