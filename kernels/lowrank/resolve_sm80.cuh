// Resolves step counts and learning rate into the constants of a list of updates.
#pragma once

#include "kernels/lowrank/compute.cuh"
#include "kernels/lowrank/rule.h"

namespace pykern::lowrank {

constexpr int kResolveThreads = 256;
constexpr int kStepsPerLaunch = 2048;

struct StepTable {
  int count;
  float* steps[kStepsPerLaunch];
};

template <class C>
__device__ __forceinline__ RuleFactors<C> rounded(const RuleFactors<double>& wide) {
  return {static_cast<C>(wide.beta1), static_cast<C>(wide.rest1),    static_cast<C>(wide.beta2),
          static_cast<C>(wide.rest2), static_cast<C>(wide.first),    static_cast<C>(wide.second),
          static_cast<C>(wide.eps),   static_cast<C>(wide.gradient), static_cast<C>(wide.shrink),
          static_cast<C>(wide.step_size)};
}

// One block; a thread takes a matrix, in float64: the bias corrections cancel in float32.
__global__ void __launch_bounds__(kResolveThreads)
    resolve_steps_kernel(const __grid_constant__ StepTable table, const __grid_constant__ ResolveParams params) {
  const bool stopped = is_set(params.found_inf);
  const double rate = params.lr != nullptr ? read_number(params.lr, params.lr_is_double) : 1.0;
  const double scale = params.grad_scale != nullptr ? static_cast<double>(*params.grad_scale) : 1.0;
  for (int i = threadIdx.x; i < table.count; i += kResolveThreads) {
    float* const step = table.steps[i];
    // Where the step is left out the count may be zero; the corrections are then those of a first step.
    const float before = *step, count = before + 1;
    if (!stopped) *step = count;
    double first = 1, root = 1;
    if (params.adaptive) {
      first = 1 / (1 - pow(params.beta1, static_cast<double>(count)));
      root = sqrt(1 - pow(params.beta2, static_cast<double>(count)));
    }
    const double shrink = rate * params.weight_decay, factor = params.corrected_eps ? 1.0 : root * first;
    RuleFactors<double> wide;
    wide.beta1 = params.beta1;
    wide.rest1 = 1 - params.beta1;
    wide.beta2 = params.beta2;
    wide.rest2 = 1 - params.beta2;
    wide.first = params.corrected_eps ? first : 1.0;
    wide.second = params.corrected_eps ? 1 / root : 1.0;
    wide.eps = params.eps;
    wide.gradient = (params.maximize ? -1.0 : 1.0) / scale;
    wide.shrink = shrink;
    wide.step_size = rate * factor;
    if (params.decay_after) wide.step_size *= 1 - shrink;
    params.rules[i].wide = wide;
    params.rules[i].single = rounded<float>(wide);
    if (params.step_factor != nullptr) params.step_factor[i] = factor;
  }
}

}  // namespace pykern::lowrank
