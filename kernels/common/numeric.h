// Storage types. No torch, CUDA or standard library header beyond <cstdint>: host files that are
// compiled once per instruction set include this one too.
#pragma once

#include <cstdint>

// For small functions that kernels and host code share.
#if defined(__CUDACC__)
#define PYKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYKERN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace pykern {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DataType : int { f32, f64, bf16, f16 };

}  // namespace pykern
