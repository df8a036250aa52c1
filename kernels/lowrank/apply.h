// The change of a list of weights, as plain parameters (pykern/lowrank/ops.py: low_rank_apply).
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern::lowrank {

enum class WeightRounding : int { nearest, stochastic, kahan };

// The weight [n, length], the gradient and the compensation have their unit strides along the same axis. Pointers
// that a step doesn't need are null.
struct ApplyMatrix {
  void* param;
  void* compensation;     // strides of param
  const void* grad;       // [n, length]
  const void* projector;  // [n, rank], without gaps; or the rows that are picked, int64 [rank]
  // [rank, length], float32 and without gaps, where the weight has sixteen bits; also where rows are picked, and then
  // float64 for a weight of float64. Else projected up already: [n, length] of the weight's type, unit stride along the
  // same axis, without gaps.
  const void *direction, *low;
  const void* factors;        // [length], float32, or float64 for float64 weights
  const float* step;          // one element; read for stochastic rounding
  const double* step_factor;  // one element
  uint64_t seed;
  int64_t param_stride, grad_stride;  // along the axis without unit stride
  int32_t n, length, rank;
  bool along_length;  // where the unit stride is; else it is along n
};

struct ApplyRule {
  const void* lr;  // one element on the device
  bool lr_is_double;
  const float *grad_scale, *found_inf;  // one element on the device, or null
  double scale, weight_decay, sign_scale;
  bool decay_after, maximize;
  WeightRounding rounding;
};

struct ApplyParams {
  DataType type;
  int64_t count;
  const ApplyMatrix* matrices;  // on the host
  ApplyRule rule;
};

const char* launch_apply(const ApplyParams& params, Stream stream);
// Of weights whose rows are picked, all of them.
const char* launch_apply_rows(const ApplyParams& params, Stream stream);

}  // namespace pykern::lowrank
