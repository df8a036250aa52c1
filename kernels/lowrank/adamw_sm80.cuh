// Plain AdamW of a list of tensors: one pass over gradient, moments and weight, bound by memory on every GPU.
#pragma once

#include "kernels/lowrank/rule_sm80.cuh"

namespace pykern::lowrank {

constexpr int kAdamWThreads = 256;
constexpr int kAdamWScalars = 4;  // elements of a thread where sixteen-byte accesses are not possible

template <class T>
struct AdamWElement {
  using C = Compute<T>;
  C gradient, first, second, weight;

  __device__ __forceinline__ void step(const RuleFactors<C>& rule) {
    const C direction = advance<InnerRule::adamw>(rule, rule.gradient * gradient, first, second);
    // A small change of the weight: 1 - decay keeps more digits than decay.
    weight = weight - (rule.shrink * weight + rule.step_size * direction);
  }
};

template <class T>
__device__ __forceinline__ void adamw_scalar(const AdamWTensor& tensor, const RuleFactors<Compute<T>>& rule,
                                             int64_t index) {
  using C = Compute<T>;
  C* first = static_cast<C*>(tensor.exp_avg) + index;
  C* second = static_cast<C*>(tensor.exp_avg_sq) + index;
  T* param = static_cast<T*>(tensor.param) + index;
  AdamWElement<T> element{widen(static_cast<const T*>(tensor.grad)[index]), *first, *second, widen(*param)};
  element.step(rule);
  *first = element.first;
  *second = element.second;
  narrow(element.weight, *param);
}

// A pack of the weight, whose moments are one or two packs each.
template <class T>
__device__ __forceinline__ void adamw_pack(const AdamWTensor& tensor, const RuleFactors<Compute<T>>& rule,
                                           int64_t index) {
  using C = Compute<T>;
  constexpr int kSize = Pack<T>::kSize, kMoments = Pack<C>::kSize;
  C* first = static_cast<C*>(tensor.exp_avg) + index;
  C* second = static_cast<C*>(tensor.exp_avg_sq) + index;
  T* param = static_cast<T*>(tensor.param) + index;
  const Pack<T> gradients = load_pack<Reuse::stream>(static_cast<const T*>(tensor.grad) + index);
  Pack<T> weights = load_pack<Reuse::stream>(param);
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
      const int e = part * kMoments + lane;
      AdamWElement<T> element{widen(gradients[e]), firsts[part][lane], seconds[part][lane], widen(weights[e])};
      element.step(rule);
      firsts[part][lane] = element.first;
      seconds[part][lane] = element.second;
      narrow(element.weight, weights[e]);
    }
    store_pack<Reuse::stream>(first + part * kMoments, firsts[part]);
    store_pack<Reuse::stream>(second + part * kMoments, seconds[part]);
  }
  store_pack<Reuse::stream>(param, weights);
}

using AdamWTable = GroupedTable<AdamWTensor>;

// In packs the first threads of a tensor also take the few elements before and after them. Else neighbouring threads
// take neighbouring elements, several each to have enough loads in flight.
template <class T>
__global__ void __launch_bounds__(kAdamWThreads)
    adamw_kernel(const __grid_constant__ AdamWTable table, const __grid_constant__ AdamWParams params) {
  using C = Compute<T>;
  const int found = table.find(blockIdx.x);
  const AdamWTensor& tensor = table.matrix[found];
  if (is_set(params.found_inf)) return;
  const RuleFactors<C> rule = factors_of(*tensor.rule, C{});
  const int64_t block = blockIdx.x - table.first_tile[found];
  if (tensor.packs == 0) {
#pragma unroll
    for (int e = 0; e < kAdamWScalars; ++e) {
      const int64_t index = (block * kAdamWScalars + e) * kAdamWThreads + threadIdx.x;
      if (index < tensor.size) adamw_scalar<T>(tensor, rule, index);
    }
    return;
  }
  const int64_t thread = block * kAdamWThreads + threadIdx.x;
  if (thread < tensor.packs) adamw_pack<T>(tensor, rule, tensor.head + thread * Pack<T>::kSize);
  const int64_t tail = tensor.head + tensor.packs * Pack<T>::kSize;
  if (thread < tensor.head) {
    adamw_scalar<T>(tensor, rule, thread);
  } else if (thread < tensor.head + tensor.size - tail) {
    adamw_scalar<T>(tensor, rule, tail + thread - tensor.head);
  }
}

}  // namespace pykern::lowrank
