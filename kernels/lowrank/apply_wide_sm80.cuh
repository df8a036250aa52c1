// Weights without a product to make: APOLLO's scaled gradients, and float32 or float64, whose update is projected up
// already. Bound by memory.
#pragma once

#include "kernels/lowrank/weight_packs_sm80.cuh"

namespace pykern::lowrank {

// What is projected up lies in matrices of the weight's sizes, or there is nothing of it.
template <class T, bool along_length>
struct ProjectedUp {
  using Packs = WeightPacks<T, along_length>;
  using C = typename Packs::C;

  const T *direction, *low;
  int rows, columns;

  __device__ __forceinline__ explicit ProjectedUp(const ApplyMatrix& m)
      : direction(static_cast<const T*>(m.direction)),
        low(static_cast<const T*>(m.low)),
        rows(along_length ? m.n : m.length),
        columns(along_length ? m.length : m.n) {}

  __device__ __forceinline__ void up(const typename Packs::Place& place, C (&values)[Packs::kSize]) const {
#pragma unroll
    for (int e = 0; e < Packs::kSize; ++e) {
      const bool reads = direction && place.row < rows && place.column + e < columns;
      values[e] = reads ? static_cast<C>(widen(direction[int64_t{place.row} * columns + place.column + e])) : C(0);
    }
  }
  __device__ __forceinline__ C sign(const typename Packs::Place& place, int e, C gradient) const {
    const C rest = gradient - static_cast<C>(widen(low[int64_t{place.row} * columns + place.column + e]));
    return rest > 0 ? C(1) : rest < 0 ? C(-1) : rest;
  }
  __device__ __forceinline__ void keep(const typename Packs::Place&, uint32_t) const {}
};

template <class T, bool along_length>
__global__ void __launch_bounds__(kApplyThreads) apply_wide_kernel(const __grid_constant__ ApplyCall call) {
  if (is_set(call.rule.found_inf)) return;
  const int index = call.table.find(blockIdx.x);
  const ApplyMatrix& m = call.table.matrix[index];
  constexpr int kSlabColumns = kSlabPacks * Pack<T>::kSize;
  const int across = ((along_length ? m.length : m.n) + kSlabColumns - 1) / kSlabColumns;
  const int tile = static_cast<int>(blockIdx.x - call.table.first_tile[index]);
  const int first_row = tile / across * kSlabRows, first_column = tile % across * kSlabColumns;
  const WeightPacks<T, along_length> packs(m, call.rule);
  ProjectedUp<T, along_length> source(m);
  packs.template visit<false>([&](int slab_row) { return first_row + slab_row; }, first_column,
                              packs.inside(first_row, first_column, kSlabRows), source);
}

}  // namespace pykern::lowrank
