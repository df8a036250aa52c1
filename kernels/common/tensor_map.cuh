// Tensor maps: what the tensor copies of kernels/ptx/sm90.cuh are told of a tensor in global memory.
#pragma once

#include "kernels/common/device.h"
#include "kernels/ptx/descriptor.h"

#if defined(__CUDACC__)
#include <cuda.h>
#else
#include "kernels/emulator/async.h"
#endif

namespace pykern {

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

struct TensorLayout {
  const void* data;    // a multiple of 16
  int rank;            // 1 to 5
  int64_t sizes[5];    // elements, innermost first
  int64_t strides[5];  // elements; strides[0] is 1, the others give multiples of 16 bytes
  int box[5];          // elements of a copy, at most 256 each; a row's bytes are a multiple of 16, and with a
                       // swizzle just its span
  ptx::Swizzle swizzle = ptx::Swizzle::none;
};

// Null, or what is wrong with the layout.
inline const char* check_tensor_layout(const TensorLayout& layout, int element_bytes) {
  if (layout.rank < 1 || layout.rank > 5) return "tensor map: the rank is not 1 to 5";
  if (reinterpret_cast<uintptr_t>(layout.data) % 16) return "tensor map: the data is not 16-byte aligned";
  if (layout.strides[0] != 1) return "tensor map: the innermost stride is not 1";
  for (int d = 0; d < layout.rank; ++d) {
    if (layout.box[d] < 1 || layout.box[d] > 256) return "tensor map: a box size is not 1 to 256";
    if (layout.sizes[d] < 1 || layout.sizes[d] > int64_t{1} << 32) return "tensor map: a size is not 1 to 2^32";
    const int64_t stride = layout.strides[d] * element_bytes;
    if (d > 0 && (stride % 16 || stride < 0 || stride >= int64_t{1} << 40)) {
      return "tensor map: a stride is not a multiple of 16 bytes below 2^40";
    }
  }
  const int row = layout.box[0] * element_bytes;
  if (row % 16) return "tensor map: a row of the box is not a multiple of 16 bytes";
  if (layout.swizzle != ptx::Swizzle::none && row != static_cast<int>(ptx::swizzle_span(layout.swizzle))) {
    return "tensor map: a row of the box is not as long as the swizzle's span";
  }
  return nullptr;
}

template <class T>
constexpr bool kIsTensorElement =
    std::is_same<T, bf16>::value || std::is_same<T, f16>::value || std::is_same<T, float>::value;

// Null, or why there is no map. No CUDA call but the look-up of the driver's function.
template <class T>
const char* make_tensor_map(TensorMap& map, const TensorLayout& layout) {
  static_assert(kIsTensorElement<T>, "tensor maps are for bf16, f16 and float");
  if (const char* error = check_tensor_layout(layout, sizeof(T))) return error;
#if defined(__CUDACC__)
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // Through the runtime: the library does not link libcuda, so it loads without a driver.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (!encode) return "tensor map: the driver has no cuTensorMapEncodeTiled (CUDA 12.0)";
  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], steps[5];
  for (int d = 0; d < layout.rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(layout.sizes[d]);
    box[d] = static_cast<cuuint32_t>(layout.box[d]);
    steps[d] = 1;
    if (d > 0) strides[d - 1] = static_cast<cuuint64_t>(layout.strides[d]) * sizeof(T);
  }
  const CUtensorMapDataType type = std::is_same<T, bf16>::value  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : std::is_same<T, f16>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  const CUresult status =
      encode(&map, type, static_cast<cuuint32_t>(layout.rank), const_cast<void*>(layout.data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(layout.swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "tensor map: the driver refused the layout";
#else
  map = {};
  map.base = static_cast<char*>(const_cast<void*>(layout.data));
  map.rank = layout.rank;
  map.element_bytes = sizeof(T);
  map.swizzle = layout.swizzle;
  for (int d = 0; d < layout.rank; ++d) {
    map.sizes[d] = layout.sizes[d];
    map.strides[d] = layout.strides[d] * static_cast<int64_t>(sizeof(T));
    map.box[d] = layout.box[d];
  }
  return nullptr;
#endif
}

}  // namespace pykern
