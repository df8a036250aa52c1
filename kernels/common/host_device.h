// For the few functions that kernels and the CPU code share: no header of torch, CUDA or the emulator.
#pragma once

#if defined(__CUDACC__)
#define PYKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYKERN_HOST_DEVICE inline __attribute__((always_inline))
#endif
