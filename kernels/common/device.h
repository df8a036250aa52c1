// The one header through which a kernel source sees its device: CUDA under nvcc, the emulator under a
// host compiler. Kernels keep to what both have:
//
//   __global__, __device__, __host__, __forceinline__, __launch_bounds__, __restrict__
//   threadIdx, blockIdx, blockDim, gridDim (x, y, z)
//   PYKERN_SHARED(Type, name)          one static shared object; Type has no constructor
//   PYKERN_DYNAMIC_SHARED(name)        unsigned char* to the launch's dynamic shared memory, 1024-byte aligned
//   __syncthreads, __syncthreads_or / _and / _count, __syncwarp
//   __shfl_sync, __shfl_up_sync, __shfl_down_sync, __shfl_xor_sync, __ballot_sync, __any_sync, __all_sync,
//   __match_any_sync, __reduce_add_sync / _min_ / _max_ / _and_ / _or_ / _xor_ (32-bit integers)
//   atomicAdd, atomicSub, atomicExch, atomicCAS, atomicMin, atomicMax, atomicAnd, atomicOr, atomicXor
//   __threadfence, __threadfence_block, __nanosleep
//   __ldg, __ldcs, __ldcg, __stcs, __stcg
//   __popc, __popcll, __clz, __clzll, __ffs, __brev, __float_as_int and its kin
//   __expf, __logf, __fdividef, __frcp_rn, __fsqrt_rn, rsqrtf, exp2f, log2f and <cmath>
//
// A loop that waits for another thread's write must call __nanosleep, or the emulator reports a hang.
// Everything else that is special to a device is in kernels/ptx, behind functions with a host twin.
#pragma once

#include "kernels/common/numeric.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define PYKERN_SHARED(type, name) __shared__ type name
#define PYKERN_DYNAMIC_SHARED(name)                          \
  extern __shared__ __align__(1024) unsigned char name##_bytes[]; \
  unsigned char* const name = name##_bytes

#else

#include "kernels/emulator/cuda.h"

#endif

namespace pykern {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// --- conversions: round to nearest even; NaN stays NaN -----------------------------------------------

#if defined(__CUDACC__)

__device__ __forceinline__ float widen(bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
__device__ __forceinline__ float widen(f16 value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ void narrow(float value, bf16& target) {
  target.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ __forceinline__ void narrow(float value, f16& target) {
  target.bits = __half_as_ushort(__float2half_rn(value));
}

#else

inline float widen(bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
inline float widen(f16 value) { return emulator::half_to_float(value.bits); }
inline void narrow(float value, bf16& target) { target.bits = emulator::float_to_bfloat(value); }
inline void narrow(float value, f16& target) { target.bits = emulator::float_to_half(value); }

#endif

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ void narrow(float value, float& target) { target = value; }
__device__ __forceinline__ void narrow(double value, double& target) { target = value; }

}  // namespace pykern
