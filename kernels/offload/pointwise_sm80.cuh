// Threads take groups of neighbours, a grid apart; what is left of whole groups goes one by one to the first threads.
#pragma once

#include "kernels/common/philox.h"
#include "kernels/offload/group.cuh"
#include "kernels/offload/pointwise.h"

namespace pykern {

constexpr int kPointwiseThreads = 256;

// --- activation ----------------------------------------------------------------------------------------------

template <class T, bool backward, bool packed>
__device__ __forceinline__ void activation_group(const ActivationParams& p, int64_t first) {
  using Values = Group<T, packed>;
  Values gate = Values::load(static_cast<const T*>(p.gate) + first), up, grad;
  const bool gated = p.up != nullptr;
  if (gated) up = Values::load(static_cast<const T*>(p.up) + first);
  if (backward) grad = Values::load(static_cast<const T*>(p.grad) + first);
#pragma unroll
  for (int i = 0; i < Values::kSize; ++i) {
    const ValueAndSlope at = activation_at(p.kind, gate.values[i]);
    const float factor = gated ? up.values[i] : 1.0f;
    if (backward) {
      gate.values[i] = grad.values[i] * factor * at.slope;
      up.values[i] = grad.values[i] * at.value;
    } else {
      gate.values[i] = at.value * factor;
    }
  }
  gate.store(static_cast<T*>(p.gate_out) + first);
  if (backward && gated) up.store(static_cast<T*>(p.up_out) + first);
}

template <class T, bool backward, bool packed>
__global__ void __launch_bounds__(kPointwiseThreads) activation_kernel(ActivationParams params) {
  constexpr int kSize = Group<T, packed>::kSize;
  const int64_t groups = params.count / kSize, thread = int64_t{blockIdx.x} * kPointwiseThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t group = thread; group < groups; group += int64_t{gridDim.x} * kPointwiseThreads) {
    activation_group<T, backward, packed>(params, group * kSize);
  }
  if (packed && groups * kSize + thread < params.count) {
    activation_group<T, backward, false>(params, groups * kSize + thread);
  }
}

// --- dropout -------------------------------------------------------------------------------------------------

template <class T, bool packed>
__global__ void __launch_bounds__(kPointwiseThreads) dropout_kernel(DropoutParams params) {
  // Four elements, those of one call of Philox, at least.
  constexpr int kSize = packed ? Pack<T>::kSize : 4;
  const int64_t groups = (params.count + kSize - 1) / kSize;
  const int64_t thread = int64_t{blockIdx.x} * kPointwiseThreads + threadIdx.x;
  const uint64_t seed = static_cast<uint64_t>(*params.seed);
  const T* x = static_cast<const T*>(params.x);
  T* y = static_cast<T*>(params.y);
#pragma unroll 1
  for (int64_t group = thread; group < groups; group += int64_t{gridDim.x} * kPointwiseThreads) {
    const int64_t first = group * kSize;
    const bool whole = packed && first + kSize <= params.count;
    float values[kSize];
    if (whole) {
      const Group<T, packed> loaded = Group<T, packed>::load(x + first);
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = loaded.values[i % Group<T, packed>::kSize];
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = first + i < params.count ? widen(x[first + i]) : 0.0f;
    }
#pragma unroll
    for (int quad = 0; quad < kSize; quad += 4) {
      const PhiloxBits bits = philox(seed, static_cast<uint64_t>(first + quad) / 4, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[quad + i] = bits.words[i] >= params.threshold ? values[quad + i] * params.scale : 0.0f;
      }
    }
    if (whole) {
      Group<T, packed> kept;
#pragma unroll
      for (int i = 0; i < Group<T, packed>::kSize; ++i) kept.values[i] = values[i];
      kept.store(y + first);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (first + i < params.count) narrow(values[i], y[first + i]);
      }
    }
  }
}

}  // namespace pykern
