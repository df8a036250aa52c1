// Reductions over a warp and over a block, in one fixed order: results repeat bit for bit.
#pragma once

#include "kernels/common/device.h"

namespace pykern {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Smallest {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Every lane gets the result. All 32 lanes must call.
template <class Operation, class T>
__device__ __forceinline__ T warp_reduce(T value, Operation operation) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = operation(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

// One value of each warp of a block.
template <class T>
struct WarpValues {
  T values[kWarpSize];
};

// Every thread of a one-dimensional block of whole warps gets the result; all must call. `shared` may be
// used again right after.
template <class Operation, class T>
__device__ __forceinline__ T block_reduce(T value, T identity, Operation operation, WarpValues<T>& shared) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  value = warp_reduce(value, operation);
  if (lane == 0) shared.values[warp] = value;
  __syncthreads();
  value = lane < warps ? shared.values[lane] : identity;
  value = warp_reduce(value, operation);
  __syncthreads();
  return value;
}

}  // namespace pykern
