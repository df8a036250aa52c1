// Adam on the GPU, over whole parameters and in the subspace, as plain parameters.
//
// The step count and the learning rate live on the device. One thread resolves them into an AdamRule and
// advances the count; the kernels after it on the stream only read the rule. So the count advances exactly
// once for a launch, whether eager or replayed from a graph.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern::lowrank {

// N = first * m / (second * sqrt(v) + eps), w <- w - (shrink * w + step_size * direction). Aligned, so that a thread
// reads it in a few wide loads.
template <class C>
struct alignas(16) AdamFactors {
  C beta1, rest1, beta2, rest2, first, second, eps, sign, shrink, step_size;
};

struct AdamRule {
  AdamFactors<float> single;
  AdamFactors<double> wide;
  double norm_before;  // the residual's norm before this step
  double limit;        // the limiter's factor on the residual, once it is known
};

struct AdamRuleParams {
  void* step;
  bool step_is_double;
  const void* lr;  // null: a rate of 1, so that step_size is what corrects the direction
  bool lr_is_double;
  const void* residual_norm;  // null without residual
  bool norm_is_double;
  double beta1, beta2, eps, weight_decay;
  bool decay_after, corrected_eps, maximize;
  AdamRule* rule;
};

const char* launch_adam_rule(const AdamRuleParams& params, Stream stream);

// All arrays have `size` elements without gaps. grad and target are of `type`; the moments are float64 where
// that is, else float32.
struct AdamParams {
  DataType type;
  int64_t size;
  const AdamRule* rule;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* target;  // the weights, or where the direction goes
  bool updates_weights;
  bool applies_step_size;  // to the direction
};

const char* launch_adam(const AdamParams& params, Stream stream);

// Moments in 8 bits (dynamic_map.h): [rank, length] without gaps, one basis vector per row.
struct Adam8BitParams {
  DataType type;  // of low and direction; not float64
  int64_t rank, length;
  const AdamRule* rule;
  const void* low;
  uint8_t* exp_avg;
  uint8_t* exp_avg_sq;
  float* exp_avg_scale;  // [rank, quant_blocks(length)]
  float* exp_avg_sq_scale;
  void* direction;
};

const char* launch_adam_8bit(const Adam8BitParams& params, Stream stream);

}  // namespace pykern::lowrank
