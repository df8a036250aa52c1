// The inner rules on moments in float32, float64 or bfloat16: one pass, bound by memory on every GPU.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/host_device.h"
#include "kernels/common/vector.cuh"
#include "kernels/lowrank/compute.cuh"
#include "kernels/lowrank/grouped.h"
#include "kernels/lowrank/rule.h"

namespace pykern::lowrank {

__device__ __forceinline__ const RuleFactors<float>& factors_of(const ResolvedRule& rule, float) { return rule.single; }
__device__ __forceinline__ const RuleFactors<double>& factors_of(const ResolvedRule& rule, double) { return rule.wide; }

PYKERN_HOST_DEVICE constexpr bool has_second(InnerRule rule) {
  return rule == InnerRule::adamw || rule == InnerRule::adabelief;
}

template <class C>
__device__ __forceinline__ C adam_direction(const RuleFactors<C>& rule, C first, C second) {
  return rule.first * first / (rule.second * sqrt(second) + rule.eps);
}

// Advances the moments of one element by its gradient; returns the direction.
template <InnerRule kRule, class C>
__device__ __forceinline__ C advance(const RuleFactors<C>& rule, C gradient, C& first, C& second) {
  if (kRule == InnerRule::lion) {
    const C mixed = rule.beta1 * first + rule.rest1 * gradient;
    first = rule.beta2 * first + rule.rest2 * gradient;
    return mixed > 0 ? C(1) : mixed < 0 ? C(-1) : mixed;  // NaN stays
  }
  if (kRule == InnerRule::momentum) {
    first = rule.beta1 * first + gradient;
    return first;
  }
  first = rule.beta1 * first + rule.rest1 * gradient;
  if (kRule == InnerRule::adabelief) {
    const C rest = gradient - first;
    second = rule.beta2 * second + rule.rest2 * rest * rest + rule.eps;
  } else {
    second = rule.beta2 * second + rule.rest2 * gradient * gradient;
  }
  return adam_direction(rule, first, second);
}

constexpr int kRuleThreads = 256;

// M: what the moments are stored in. A thread takes sixteen bytes of a moment.
template <class C, class M>
struct RuleUnit {
  static constexpr int kSize = Pack<M>::kSize, kPart = Pack<C>::kSize;

  const RuleMatrix& matrix;
  const RuleFactors<C> factors;

  template <InnerRule kRule>
  __device__ __forceinline__ void packs(int64_t index) const {
    const C* low = static_cast<const C*>(matrix.low) + index;
    C* direction = static_cast<C*>(matrix.direction) + index;
    Pack<C> gradients[kSize / kPart];
    Pack<M> first = load_pack<Reuse::stream>(static_cast<const M*>(matrix.exp_avg) + index), second;
    if (has_second(kRule)) second = load_pack<Reuse::stream>(static_cast<const M*>(matrix.exp_avg_sq) + index);
#pragma unroll
    for (int part = 0; part < kSize / kPart; ++part) gradients[part] = load_pack(low + part * kPart);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      C m = widen(first[e]), v = has_second(kRule) ? widen(second[e]) : C(0);
      C& value = gradients[e / kPart][e % kPart];
      value = advance<kRule>(factors, value, m, v);
      narrow(m, first[e]);
      if (has_second(kRule)) narrow(v, second[e]);
    }
    store_pack<Reuse::stream>(static_cast<M*>(matrix.exp_avg) + index, first);
    if (has_second(kRule)) store_pack<Reuse::stream>(static_cast<M*>(matrix.exp_avg_sq) + index, second);
    // What comes after reads the direction again soon.
#pragma unroll
    for (int part = 0; part < kSize / kPart; ++part) store_pack(direction + part * kPart, gradients[part]);
  }

  template <InnerRule kRule>
  __device__ __forceinline__ void scalars(int64_t index, int64_t end) const {
    M* firsts = static_cast<M*>(matrix.exp_avg);
    M* seconds = static_cast<M*>(matrix.exp_avg_sq);
#pragma unroll 1
    for (; index < end; ++index) {
      C m = widen(firsts[index]), v = has_second(kRule) ? widen(seconds[index]) : C(0);
      const C value = advance<kRule>(factors, static_cast<const C*>(matrix.low)[index], m, v);
      narrow(m, firsts[index]);
      if (has_second(kRule)) narrow(v, seconds[index]);
      static_cast<C*>(matrix.direction)[index] = value;
    }
  }

  template <InnerRule kRule>
  __device__ __forceinline__ void run(int64_t index, int64_t end) const {
    if (matrix.packs && index + kSize <= end) {
      packs<kRule>(index);
    } else {
      scalars<kRule>(index, end < index + kSize ? end : index + kSize);
    }
  }
};

using RuleTable = GroupedTable<RuleMatrix>;

template <class C, class M>
__global__ void __launch_bounds__(kRuleThreads)
    inner_rule_kernel(const __grid_constant__ RuleTable table, const __grid_constant__ RuleParams params) {
  const int found = table.find(blockIdx.x);
  const RuleMatrix& matrix = table.matrix[found];
  const int64_t thread = int64_t{blockIdx.x - table.first_tile[found]} * kRuleThreads + threadIdx.x;
  const int64_t index = thread * Pack<M>::kSize, end = matrix.rank * matrix.length;
  if (index >= end) return;
  if (is_set(params.found_inf)) {
    for (int64_t i = index; i < end && i < index + Pack<M>::kSize; ++i) static_cast<C*>(matrix.direction)[i] = 0;
    return;
  }
  const RuleUnit<C, M> unit{matrix, factors_of(*matrix.rule, C{})};
  switch (params.rule) {
    case InnerRule::adamw: return unit.template run<InnerRule::adamw>(index, end);
    case InnerRule::adabelief: return unit.template run<InnerRule::adabelief>(index, end);
    case InnerRule::lion: return unit.template run<InnerRule::lion>(index, end);
    case InnerRule::momentum: return unit.template run<InnerRule::momentum>(index, end);
  }
}

}  // namespace pykern::lowrank
