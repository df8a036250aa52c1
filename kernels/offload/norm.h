// RMS norm and layer norm of rows.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// y = (x - mean) * rstd * weight + bias. Without `mean` nothing is subtracted: an RMS norm.
struct NormParams {
  const void *x, *weight, *bias;  // weight and bias may be null
  void* y;
  float *mean, *rstd;
  int64_t rows, columns;
  float eps;
};

struct NormBackwardParams {
  const void *grad, *x, *weight;
  const float *mean, *rstd;
  void *grad_x, *grad_weight, *grad_bias;  // the last two may be null: not wanted
  float* partial;                          // [norm_backward_blocks, wanted, columns]
  int64_t rows, columns;
};

// Parts whose sums of columns are added up at last.
int64_t norm_backward_blocks(int64_t rows, int64_t columns);

const char* launch_norm(DataType type, const NormParams& params, Stream stream);
const char* launch_norm_backward(DataType type, const NormBackwardParams& params, Stream stream);

}  // namespace pykern
