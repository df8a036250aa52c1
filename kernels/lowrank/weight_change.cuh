// The change of one weight, and its rounding, whichever kernel makes it.
#pragma once

#include "kernels/lowrank/apply.h"
#include "kernels/lowrank/compute.cuh"
#include "kernels/lowrank/stochastic_rounding.h"

namespace pykern::lowrank {

template <class T>
struct WeightChange {
  using C = Compute<T>;

  C shrink, step_size, scale, sign_scale, to_gradient;

  __device__ __forceinline__ WeightChange(const ApplyRule& rule, const ApplyMatrix& m) {
    const double lr = read_number(rule.lr, rule.lr_is_double);
    const double decay = lr * rule.weight_decay;
    shrink = static_cast<C>(decay);
    step_size = static_cast<C>(lr * *m.step_factor * (rule.decay_after ? 1 - decay : 1));
    scale = static_cast<C>(rule.scale);
    sign_scale = static_cast<C>(rule.sign_scale);
    to_gradient = rule.maximize ? C(-1) : C(1);
    if (rule.grad_scale) to_gradient /= static_cast<C>(*rule.grad_scale);
  }

  // A small part of the weight: 1 - decay would keep fewer digits of decay.
  __device__ __forceinline__ C operator()(C weight, C direction) const {
    return -shrink * weight - step_size * direction;
  }
};

// `lost` is what rounding has taken from the weight before, and takes now.
template <class C, class T>
__device__ __forceinline__ void change_kahan(C change, T& weight, T& lost) {
  const C before = widen(weight), wanted = static_cast<C>(widen(lost)) + change;
  narrow(before + wanted, weight);
  narrow(wanted - (static_cast<C>(widen(weight)) - before), lost);
}

// Weight e is element_of(e) of the matrix [n, length], counted along its rows: there it has its random word, whichever
// thread rounds it. The rounds of all are made side by side, for one computation of their keys.
template <int count, class T, class ElementOf>
__device__ __forceinline__ void change_stochastic(const float* changes, uint64_t seed, const ElementOf& element_of,
                                                  uint32_t step, T* weights) {
  PhiloxBits bits[count];
#pragma unroll
  for (int e = 0; e < count; ++e) {
    const uint64_t element = element_of(e);
    bits[e] = {{static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32), step, 0}};
  }
  PhiloxKeys keys(seed);
#pragma unroll
  for (int round = 0; round < 10; ++round, keys.next()) {
#pragma unroll
    for (int e = 0; e < count; ++e) mix_philox(bits[e], keys);
  }
#pragma unroll
  for (int e = 0; e < count; ++e) {
    weights[e] = round_stochastic(__float_as_uint(widen(weights[e]) + changes[e]), bits[e].words[0], T{});
  }
}

}  // namespace pykern::lowrank
