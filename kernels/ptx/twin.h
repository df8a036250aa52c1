// How a PTX function and its host twin share one declaration: the twin also learns who calls it.
#pragma once

#include "kernels/common/device.h"
#include "kernels/ptx/descriptor.h"

#if defined(__CUDACC__)
#define PYKERN_CALLER
#define PYKERN_AND_CALLER
#else
#include "kernels/emulator/async.h"
#include "kernels/emulator/matrix.h"
#define PYKERN_CALLER PYKERN_SITE
#define PYKERN_AND_CALLER , PYKERN_SITE
#endif

#define PYKERN_PTX __device__ __forceinline__

namespace pykern::ptx {

// The 32-bit address of shared memory that instructions and matrix descriptors take.
PYKERN_PTX uint32_t shared_address(const void* shared) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#else
  return emulator::window_address(shared);
#endif
}

#if !defined(__CUDACC__)
template <class T>
constexpr emulator::MatrixType matrix_type() {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "the element type is bf16 or f16");
  return std::is_same<T, bf16>::value ? emulator::MatrixType::bf16 : emulator::MatrixType::f16;
}
#endif

}  // namespace pykern::ptx
