// Rows are spread over threadIdx.y and blockIdx.x, the columns of a row over threadIdx.x and blockIdx.y.
#pragma once

#include <type_traits>

#include "kernels/attention/rows.h"
#include "kernels/common/vector.cuh"

namespace pykern {

constexpr int kRowsThreads = 256;
// Loads that a thread has under way: a copy has nothing else to hide their latency with.
constexpr int kGatherUnits = 4;
constexpr int kBackwardUnits = 2;

using Sixteen = Pack<uint32_t>;

__device__ __forceinline__ Sixteen load_unit(const Sixteen* source) { return load_pack(source->values); }
__device__ __forceinline__ void store_unit(Sixteen* target, const Sixteen& unit) { store_pack(target->values, unit); }
template <class Unit>
__device__ __forceinline__ Unit load_unit(const Unit* source) {
  return *source;
}
template <class Unit>
__device__ __forceinline__ void store_unit(Unit* target, Unit unit) {
  *target = unit;
}

// NaN in every floating-point type.
template <class Unit>
__device__ __forceinline__ Unit all_bits() {
  return static_cast<Unit>(~Unit{0});
}
template <>
__device__ __forceinline__ Sixteen all_bits<Sixteen>() {
  return {~0u, ~0u, ~0u, ~0u};
}

template <class Unit>
__global__ void __launch_bounds__(kRowsThreads) gather_rows_kernel(GatherRows params) {
  const int64_t n = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (n >= params.out_rows) return;
  const int64_t row = params.rows[n];
  const bool inside = row >= 0 && row < params.source_rows;
  const int64_t units = params.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const auto* source = reinterpret_cast<const Unit*>(static_cast<const unsigned char*>(params.source) +
                                                     (inside ? row : 0) * params.source_stride);
  Unit* target = static_cast<Unit*>(params.out) + n * units;

  const int64_t step = int64_t{blockDim.x} * gridDim.y;
  for (int64_t unit = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; unit < units; unit += kGatherUnits * step) {
    Unit values[kGatherUnits];
#pragma unroll
    for (int i = 0; i < kGatherUnits; ++i) {
      values[i] = all_bits<Unit>();
      if (inside && unit + i * step < units) values[i] = load_unit(source + unit + i * step);
    }
#pragma unroll
    for (int i = 0; i < kGatherUnits; ++i) {
      if (unit + i * step < units) store_unit(target + unit + i * step, values[i]);
    }
  }
}

// Each source row is written once, by the thread that sums it: no atomics, one order.
template <class T, bool packs>
__global__ void __launch_bounds__(kRowsThreads) gather_rows_backward_kernel(GatherRowsBackward params) {
  using Wide = std::conditional_t<std::is_same<T, double>::value, double, float>;
  constexpr int kSize = packs ? Pack<T>::kSize : 1;
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= params.source_rows) return;
  const int64_t begin = params.offsets[row] > 0 ? params.offsets[row] : 0;
  const int64_t end = params.offsets[row + 1] < params.out_rows ? params.offsets[row + 1] : params.out_rows;
  const int64_t units = params.columns / kSize;
  const T* source = static_cast<const T*>(params.grad_out);
  T* target = static_cast<T*>(params.grad_source) + row * params.columns;

  const int64_t step = int64_t{blockDim.x} * gridDim.y;
  for (int64_t unit = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; unit < units; unit += kBackwardUnits * step) {
    Wide sums[kBackwardUnits][kSize] = {};
#pragma unroll 2
    for (int64_t use = begin; use < end; ++use) {
      const int64_t n = params.order[use];
      const bool inside = n >= 0 && n < params.out_rows;
      const T* from = source + (inside ? n : 0) * params.grad_stride;
#pragma unroll
      for (int i = 0; i < kBackwardUnits; ++i) {
        if (!inside || unit + i * step >= units) continue;
        if constexpr (packs) {
          const Pack<T> values = load_pack(from + (unit + i * step) * kSize);
#pragma unroll
          for (int j = 0; j < kSize; ++j) sums[i][j] += widen(values[j]);
        } else {
          sums[i][0] += widen(from[unit + i * step]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBackwardUnits; ++i) {
      if (unit + i * step >= units) continue;
      if constexpr (packs) {
        Pack<T> values;
#pragma unroll
        for (int j = 0; j < kSize; ++j) narrow(sums[i][j], values[j]);
        store_pack(target + (unit + i * step) * kSize, values);
      } else {
        narrow(sums[i][0], target[unit + i * step]);
      }
    }
  }
}

}  // namespace pykern
