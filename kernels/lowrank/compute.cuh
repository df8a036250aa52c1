// What the optimizer's kernels compute in, and numbers that lie on the device.
#pragma once

#include "kernels/common/device.h"

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

// One element, float32 or float64.
__device__ __forceinline__ double read_number(const void* source, bool is_double) {
  return is_double ? *static_cast<const double*>(source) : static_cast<double>(*static_cast<const float*>(source));
}

// torch.amp's flag; null: not given.
__device__ __forceinline__ bool is_set(const float* found_inf) { return found_inf != nullptr && *found_inf != 0; }

}  // namespace pykern::lowrank
