// The block that finishes last goes on with what all of them have left.
#pragma once

#include "kernels/common/device.h"

namespace pykern {

// Whether this block is the last one of the launch; it sees what the others wrote. `finished` is zero at first, and
// again after. All threads must call.
__device__ __forceinline__ bool is_last_block(unsigned long long* finished, bool& shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared = atomicAdd(finished, 1ull) == gridDim.x - 1;
    if (shared) *finished = 0;
  }
  __syncthreads();
  const bool last = shared;
  if (last) __threadfence();
  return last;
}

}  // namespace pykern
