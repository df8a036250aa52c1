// Resolves step count and learning rate into the constants of one update.
#pragma once

#include "kernels/lowrank/adam_sm80.cuh"

namespace pykern::lowrank {

template <class C>
__device__ __forceinline__ AdamFactors<C> rounded(const AdamFactors<double>& wide) {
  return {static_cast<C>(wide.beta1), static_cast<C>(wide.rest1),  static_cast<C>(wide.beta2),
          static_cast<C>(wide.rest2), static_cast<C>(wide.first),  static_cast<C>(wide.second),
          static_cast<C>(wide.eps),   static_cast<C>(wide.sign),   static_cast<C>(wide.shrink),
          static_cast<C>(wide.step_size)};
}

// A single thread, in float64: the bias corrections cancel in float32.
__global__ void __launch_bounds__(1) adam_rule_kernel(AdamRuleParams params) {
  const double count = read_number(params.step, params.step_is_double) + 1;
  write_number(params.step, params.step_is_double, count);
  const double rate = params.lr != nullptr ? read_number(params.lr, params.lr_is_double) : 1.0;
  const double first = 1 / (1 - pow(params.beta1, count)), root = sqrt(1 - pow(params.beta2, count));
  const double shrink = rate * params.weight_decay;
  AdamFactors<double> wide;
  wide.beta1 = params.beta1;
  wide.rest1 = 1 - params.beta1;
  wide.beta2 = params.beta2;
  wide.rest2 = 1 - params.beta2;
  wide.first = params.corrected_eps ? first : 1.0;
  wide.second = params.corrected_eps ? 1 / root : 1.0;
  wide.eps = params.eps;
  wide.sign = params.maximize ? -1.0 : 1.0;
  wide.shrink = shrink;
  wide.step_size = params.corrected_eps ? rate : rate * root * first;
  if (params.decay_after) wide.step_size *= 1 - shrink;
  params.rule->wide = wide;
  params.rule->single = rounded<float>(wide);
  params.rule->norm_before =
      params.residual_norm != nullptr ? read_number(params.residual_norm, params.norm_is_double) : 0.0;
  params.rule->limit = 0.0;
}

}  // namespace pykern::lowrank
