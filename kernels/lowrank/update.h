// The last pass of a low-rank step over the weights, as plain parameters.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"
#include "kernels/lowrank/adam.h"

namespace pykern::lowrank {

// w <- w - (shrink * w + step_size * (scale * update + limit * sign * factor * grad)), [rows, columns].
struct WeightUpdateParams {
  DataType type;
  int64_t rows, columns;
  const AdamRule* rule;
  void* param;
  int64_t param_stride;
  const void* update;  // without gaps
  double scale;
  const void* grad;  // null without residual
  int64_t grad_stride;
  const void* factors;  // of the moments' type: one for each row, or for each column
  bool factor_per_row;
};

const char* launch_weight_update(const WeightUpdateParams& params, Stream stream);

}  // namespace pykern::lowrank
