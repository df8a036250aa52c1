// Projections to rows of the gradient, and back: no products. Bound by memory, and where nothing but the picked rows
// changes and these lie along memory, by that of these rows.
#pragma once

#include "kernels/common/device.h"
#include "kernels/lowrank/project_call.h"
#include "kernels/lowrank/weight_packs_sm80.cuh"

namespace pykern::lowrank {

constexpr int kPickThreads = 256;

// The row that is picked, or -1. What is no row is none.
template <class Matrix>
__device__ __forceinline__ int picked_row(const Matrix& m, int k) {
  const int64_t row = static_cast<const int64_t*>(m.projector)[k];
  return row >= 0 && row < m.n ? static_cast<int>(row) : -1;
}

// A thread takes a pack of a row that lies along memory, else one element.
template <class T, bool along_length>
constexpr int kPickElements = along_length ? Pack<T>::kSize : 1;
template <class T, bool along_length>
constexpr int kPickWidth = kPickThreads * kPickElements<T, along_length>;

template <class T, bool along_length>
__global__ void __launch_bounds__(kPickThreads) pick_rows_kernel(const __grid_constant__ ProjectCall call) {
  using C = Compute<T>;
  constexpr int kSize = kPickElements<T, along_length>, kWidth = kPickWidth<T, along_length>;
  const int index = call.table.find(blockIdx.x);
  const ProjectMatrix& m = call.table.matrix[index];
  const int tile = static_cast<int>(blockIdx.x - call.table.first_tile[index]);
  const int across = (m.length + kWidth - 1) / kWidth, k = tile / across;
  const int row = picked_row(m, k);
  const int64_t line = int64_t{tile % across} * kWidth + int64_t{threadIdx.x} * kSize;
  if (line >= m.length) return;
  const C sign = call.maximize ? C(-1) : C(1), factor = call.grad_scale ? sign / C(*call.grad_scale) : sign;
  const T* const matrix = static_cast<const T*>(m.matrix);
  C* const low = static_cast<C*>(m.low);
  const int64_t from = along_length ? row * m.stride + line : line * m.stride + row, to = int64_t{k} * m.length + line;
  C values[kSize] = {};
  if (row >= 0) {
    if (along_length && line + kSize <= m.length && allows_packs(matrix, m.stride)) {
      const Pack<T> pack = load_pack(matrix + from);
#pragma unroll
      for (int e = 0; e < kSize; ++e) values[e] = factor * static_cast<C>(widen(pack[e]));
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (line + e < m.length) values[e] = factor * static_cast<C>(widen(matrix[from + e]));
      }
    }
  }
  constexpr int kStored = Pack<C>::kSize;
  if (along_length && line + kSize <= m.length && allows_packs(low, m.length)) {
#pragma unroll
    for (int first = 0; first < kSize; first += kStored) {
      Pack<C> pack;
#pragma unroll
      for (int e = 0; e < kStored; ++e) pack[e] = values[(first + e) % kSize];
      store_pack(low + to + first, pack);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    if (line + e < m.length) low[to + e] = values[e];
  }
}

struct PickedApplyCall {
  ApplyTable table;
  ApplyRule rule;
  bool picked_only;  // the other rows stay as they are; picked rows lie along memory
};
static_assert(sizeof(PickedApplyCall) <= 32764, "more than the parameters of a kernel hold");

// Of the rows of W that a slab has: the row of the low-rank matrices which changes each, or -1; and where they are.
struct PickedSlab {
  int low_row[kSlabPacks * 8];
  int weight_row[kSlabRows];
};
static_assert(kSlabPacks * 8 >= kSlabRows, "a slab has no more rows of W than columns");

// What is projected up is a row of a low-rank matrix, or nothing.
template <class T, bool along_length>
struct PickedUp {
  using Packs = WeightPacks<T, along_length>;
  using C = typename Packs::C;

  const C *direction, *low;
  int length;
  const int* low_row;

  __device__ __forceinline__ C element(const C* of, const typename Packs::Place& place, int e) const {
    const int k = low_row[along_length ? place.slab_row : place.slab_pack * Packs::kSize + e];
    const int line = along_length ? place.column + e : place.row;
    return of && k >= 0 && line < length ? of[int64_t{k} * length + line] : C(0);
  }
  __device__ __forceinline__ void up(const typename Packs::Place& place, C (&values)[Packs::kSize]) const {
#pragma unroll
    for (int e = 0; e < Packs::kSize; ++e) values[e] = element(direction, place, e);
  }
  __device__ __forceinline__ C sign(const typename Packs::Place& place, int e, C gradient) const {
    const C rest = gradient - element(low, place, e);
    return rest > 0 ? C(1) : rest < 0 ? C(-1) : rest;
  }
  __device__ __forceinline__ void keep(const typename Packs::Place&, uint32_t) const {}
};

template <class T, bool along_length>
__global__ void __launch_bounds__(kApplyThreads) apply_rows_kernel(const __grid_constant__ PickedApplyCall call) {
  PYKERN_SHARED(PickedSlab, slab);
  if (is_set(call.rule.found_inf)) return;
  using C = Compute<T>;
  const int index = call.table.find(blockIdx.x);
  const ApplyMatrix& m = call.table.matrix[index];
  constexpr int kSlabColumns = kSlabPacks * Pack<T>::kSize;
  const int across = ((along_length ? m.length : m.n) + kSlabColumns - 1) / kSlabColumns;
  const int tile = static_cast<int>(blockIdx.x - call.table.first_tile[index]);
  // Of the weight as it lies in memory, or of the picked rows.
  const int first_row = tile / across * kSlabRows, first_column = tile % across * kSlabColumns;
  const int rows = along_length ? m.n : m.length, thread = static_cast<int>(threadIdx.x);
  if (thread < kSlabPacks * 8) slab.low_row[thread] = -1;
  if (thread < kSlabRows) slab.weight_row[thread] = call.picked_only ? rows : first_row + thread;
  __syncthreads();
  const int first_n = along_length ? first_row : first_column, count_n = along_length ? kSlabRows : kSlabColumns;
  for (int k = thread; k < m.rank; k += kApplyThreads) {
    const int row = picked_row(m, k), place = (call.picked_only ? k : row) - first_n;
    if (row < 0 || place < 0 || place >= count_n) continue;
    slab.low_row[place] = k;
    if (call.picked_only) slab.weight_row[place] = row;
  }
  __syncthreads();
  bool inside = first_column + kSlabColumns <= (along_length ? m.length : m.n);
  for (int s = 0; s < kSlabRows; ++s) inside = inside && slab.weight_row[s] < rows;
  const WeightPacks<T, along_length> packs(m, call.rule);
  PickedUp<T, along_length> source{static_cast<const C*>(m.direction), static_cast<const C*>(m.low), m.length,
                                   slab.low_row};
  packs.template visit<false>([&](int slab_row) { return slab.weight_row[slab_row]; }, first_column, inside, source);
}

}  // namespace pykern::lowrank
