// One pass over gradient, moments and weights (or direction): bound by memory on every GPU.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/vector.cuh"
#include "kernels/lowrank/adam.h"

namespace pykern::lowrank {

template <class T>
struct ComputeType {
  using Type = float;
};
template <>
struct ComputeType<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeType<T>::Type;

__device__ __forceinline__ const AdamFactors<float>& factors_of(const AdamRule& rule, float) { return rule.single; }
__device__ __forceinline__ const AdamFactors<double>& factors_of(const AdamRule& rule, double) { return rule.wide; }

template <class C>
__device__ __forceinline__ void advance(const AdamFactors<C>& rule, C gradient, C& first, C& second) {
  first = rule.beta1 * first + rule.rest1 * gradient;
  second = rule.beta2 * second + rule.rest2 * gradient * gradient;
}

template <class C>
__device__ __forceinline__ C adam_direction(const AdamFactors<C>& rule, C first, C second) {
  return rule.first * first / (rule.second * sqrt(second) + rule.eps);
}

// A small change of the weight: 1 - decay keeps more digits than decay.
template <class C>
__device__ __forceinline__ C changed_weight(const AdamFactors<C>& rule, C weight, C direction) {
  return weight - (rule.shrink * weight + rule.step_size * direction);
}

// --- numbers on the device, float32 or float64 ---------------------------------------------------------

__device__ __forceinline__ double read_number(const void* source, bool is_double) {
  return is_double ? *static_cast<const double*>(source) : static_cast<double>(*static_cast<const float*>(source));
}

__device__ __forceinline__ void write_number(void* target, bool is_double, double value) {
  if (is_double) {
    *static_cast<double*>(target) = value;
  } else {
    *static_cast<float*>(target) = static_cast<float>(value);
  }
}

// --- elements --------------------------------------------------------------------------------------

constexpr int kAdamThreads = 256;
constexpr int kAdamScalars = 4;  // elements of a thread where sixteen-byte accesses are not possible

template <class T>
struct AdamElement {
  using C = Compute<T>;
  C gradient, first, second, weight;

  template <bool kWeights>
  __device__ __forceinline__ void step(const AdamFactors<C>& rule, C direction_factor) {
    advance(rule, rule.sign * gradient, first, second);
    const C direction = adam_direction(rule, first, second);
    weight = kWeights ? changed_weight(rule, weight, direction) : direction * direction_factor;
  }
};

template <class T, bool kWeights>
__device__ __forceinline__ void adam_scalar(const AdamParams& params, const AdamFactors<Compute<T>>& rule,
                                            Compute<T> direction_factor, int64_t index) {
  using C = Compute<T>;
  C* first = static_cast<C*>(params.exp_avg) + index;
  C* second = static_cast<C*>(params.exp_avg_sq) + index;
  T* target = static_cast<T*>(params.target) + index;
  AdamElement<T> element;
  element.gradient = widen(static_cast<const T*>(params.grad)[index]);
  element.first = *first;
  element.second = *second;
  if (kWeights) element.weight = widen(*target);
  element.template step<kWeights>(rule, direction_factor);
  *first = element.first;
  *second = element.second;
  narrow(element.weight, *target);
}

// Every array is aligned to sixteen bytes from element `head` on. A thread takes one pack of T, whose moments
// are one or two packs each; the first threads also take the few elements before and after the packs.
template <class T, bool kWeights>
__global__ void __launch_bounds__(kAdamThreads) adam_packs_kernel(AdamParams params, int head, int64_t packs) {
  using C = Compute<T>;
  constexpr int kSize = Pack<T>::kSize, kMoments = Pack<C>::kSize;
  const AdamFactors<C> rule = factors_of(*params.rule, C{});
  const C direction_factor = params.applies_step_size ? rule.step_size : C(1);
  const int64_t thread = int64_t{blockIdx.x} * kAdamThreads + threadIdx.x;
  if (thread < packs) {
    const int64_t index = head + thread * kSize;
    const T* grad = static_cast<const T*>(params.grad) + index;
    C* first = static_cast<C*>(params.exp_avg) + index;
    C* second = static_cast<C*>(params.exp_avg_sq) + index;
    T* target = static_cast<T*>(params.target) + index;
    const Pack<T> gradients = load_pack<Reuse::stream>(grad);
    Pack<T> targets;
    if (kWeights) targets = load_pack<Reuse::stream>(target);
    Pack<C> firsts[kSize / kMoments], seconds[kSize / kMoments];
#pragma unroll
    for (int part = 0; part < kSize / kMoments; ++part) {
      firsts[part] = load_pack<Reuse::stream>(first + part * kMoments);
      seconds[part] = load_pack<Reuse::stream>(second + part * kMoments);
    }
#pragma unroll
    for (int part = 0; part < kSize / kMoments; ++part) {
#pragma unroll
      for (int lane = 0; lane < kMoments; ++lane) {
        AdamElement<T> element;
        element.gradient = widen(gradients[part * kMoments + lane]);
        element.first = firsts[part][lane];
        element.second = seconds[part][lane];
        if (kWeights) element.weight = widen(targets[part * kMoments + lane]);
        element.template step<kWeights>(rule, direction_factor);
        firsts[part][lane] = element.first;
        seconds[part][lane] = element.second;
        narrow(element.weight, targets[part * kMoments + lane]);
      }
      store_pack<Reuse::stream>(first + part * kMoments, firsts[part]);
      store_pack<Reuse::stream>(second + part * kMoments, seconds[part]);
    }
    store_pack<Reuse::stream>(target, targets);
  }
  const int64_t tail = head + packs * kSize;
  if (thread < head) {
    adam_scalar<T, kWeights>(params, rule, direction_factor, thread);
  } else if (thread < head + params.size - tail) {
    adam_scalar<T, kWeights>(params, rule, direction_factor, tail + thread - head);
  }
}

// Any alignment: neighbouring threads take neighbouring elements, several each to have enough loads in flight.
template <class T, bool kWeights>
__global__ void __launch_bounds__(kAdamThreads) adam_scalars_kernel(AdamParams params) {
  using C = Compute<T>;
  const AdamFactors<C> rule = factors_of(*params.rule, C{});
  const C direction_factor = params.applies_step_size ? rule.step_size : C(1);
  const int64_t begin = int64_t{blockIdx.x} * (kAdamThreads * kAdamScalars) + threadIdx.x;
  AdamElement<T> elements[kAdamScalars];
#pragma unroll
  for (int e = 0; e < kAdamScalars; ++e) {
    const int64_t index = begin + e * kAdamThreads;
    if (index < params.size) {
      elements[e].gradient = widen(static_cast<const T*>(params.grad)[index]);
      elements[e].first = static_cast<const C*>(params.exp_avg)[index];
      elements[e].second = static_cast<const C*>(params.exp_avg_sq)[index];
      if (kWeights) elements[e].weight = widen(static_cast<const T*>(params.target)[index]);
    }
  }
#pragma unroll
  for (int e = 0; e < kAdamScalars; ++e) {
    const int64_t index = begin + e * kAdamThreads;
    if (index < params.size) {
      elements[e].template step<kWeights>(rule, direction_factor);
      static_cast<C*>(params.exp_avg)[index] = elements[e].first;
      static_cast<C*>(params.exp_avg_sq)[index] = elements[e].second;
      narrow(elements[e].weight, static_cast<T*>(params.target)[index]);
    }
  }
}

}  // namespace pykern::lowrank
