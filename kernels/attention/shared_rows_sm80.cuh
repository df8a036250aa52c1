// Rows of heads in shared memory: how they get there, and how mma's operands are read from them.
#pragma once

#include "kernels/attention/visibility.cuh"
#include "kernels/ptx/sm80.cuh"

namespace pykern {

// Rows of `size` elements of two bytes, in packs of sixteen bytes. The packs of a row are permuted, so that ldmatrix
// finds the same pack of eight neighbouring rows in eight different groups of banks. `whole`: a row is a multiple of
// 128 bytes; else an odd multiple of 64, where two rows lie across the banks together.
template <class T, bool whole>
struct SharedRows {
  unsigned char* memory;
  int first;  // the first row's first byte in `memory`, a multiple of 128
  int size;

  __device__ __forceinline__ T* pack(int row, int pack) const {
    return reinterpret_cast<T*>(memory + first + offset(row, pack));
  }

  // What a warp's `lane` gets of operands. `index` counts blocks of 16 columns, `first_row` is a multiple of 16. The
  // operand A of 16 rows:
  __device__ __forceinline__ void load_a(uint32_t (&a)[4], int lane, int first_row, int index) const {
    ptx::ldmatrix<4>(a, block(first_row, offset(lane % 16, lane / 16), index));
  }
  // B, two of them, whose columns are 8 rows each:
  __device__ __forceinline__ void load_b_of_columns(uint32_t (&b)[4], int lane, int first_row, int index) const {
    ptx::ldmatrix<4>(b, block(first_row, offset(lane / 16 * 8 + lane % 8, lane / 8 % 2), index));
  }
  // B, two of them, of 16 rows and 8 columns each:
  __device__ __forceinline__ void load_b_of_rows(uint32_t (&b)[4], int lane, int first_row, int index) const {
    ptx::ldmatrix<4, true>(b, block(first_row, offset(lane % 16, lane / 16), index));
  }

 private:
  __device__ __forceinline__ int offset(int row, int pack) const {
    const int swizzle = whole ? row & 7 : row >> 1 & 3;
    return row * size * 2 + 16 * (pack ^ swizzle);
  }
  // The permutation is undone on the whole address: one register for a lane's offset, rather than one for each index.
  __device__ __forceinline__ const void* block(int first_row, int lane_offset, int index) const {
    constexpr int kPermuted = whole ? 4 : 2;
    const int address = first + first_row * size * 2 + lane_offset;
    return memory + (address ^ index % kPermuted * 32) + index / kPermuted * kPermuted * 32;
  }
};

// By value: a reference to one of two would put them into local memory.
template <class T, bool whole>
__device__ __forceinline__ SharedRows<T, whole> choose(bool first, const SharedRows<T, whole>& a,
                                                       const SharedRows<T, whole>& b) {
  return {a.memory, first ? a.first : b.first, first ? a.size : b.size};
}

template <int size>
constexpr bool kWholeRows = size % 64 == 0;

// Starts copies of `rows` rows by all threads of a block; source(row) is null for a row of zeros. Columns from
// `columns` to `size` become zero.
template <int rows, int size, int threads, class T, class Source>
__device__ __forceinline__ void copy_rows(const SharedRows<T, kWholeRows<size>>& target, const void* tensor,
                                          int columns, const Source& source) {
  constexpr int kPacks = size / 8;
  static_assert(rows * kPacks % threads == 0, "every thread copies alike");
  const int thread = ptx::forget_origin(threadIdx.x);
#pragma unroll 1
  for (int i = 0; i < rows * kPacks / threads; ++i) {
    const int index = i * threads + thread, row = index / kPacks, pack = index % kPacks;
    const T* from = source(row);
    const bool reads = from != nullptr && 8 * pack < columns;
    // Without bytes to read the address stands for nothing, but it is that of a tensor.
    ptx::cp_async<16>(target.pack(row, pack), reads ? from + 8 * pack : static_cast<const T*>(tensor), reads ? 16 : 0);
  }
}

// Writes accumulators of 16 rows, times `factor`, in T.
template <class T, bool whole, int n>
__device__ __forceinline__ void store_accumulators(const SharedRows<T, whole>& target, int first_row,
                                                   const float (&values)[n][4], int columns, float factor) {
  const int lane = threadIdx.x % kWarpSize, row = first_row + lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (8 * j >= columns) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<uint32_t*>(target.pack(row + 8 * i, j) + column) =
          narrow_pair(factor * values[j][2 * i], factor * values[j][2 * i + 1], T{}).bits;
    }
  }
}

// Copies rows to global memory; target(row) is null for a row that isn't there.
template <int rows, int size, int threads, class T, class Target>
__device__ __forceinline__ void store_rows(const SharedRows<T, kWholeRows<size>>& source, int columns,
                                           const Target& target) {
  constexpr int kPacks = size / 8;
#pragma unroll 2
  for (int index = threadIdx.x; index < rows * kPacks; index += threads) {
    const int row = index / kPacks, pack = index % kPacks;
    T* to = target(row);
    if (to != nullptr && 8 * pack < columns) {
      store_pack(to + 8 * pack, *reinterpret_cast<const Pack<T>*>(source.pack(row, pack)));
    }
  }
}

// Two accumulators of 8 columns as the operand A of a product over those 16 columns.
template <class T>
__device__ __forceinline__ void accumulators_as_a(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
  a[0] = narrow_pair(low[0], low[1], T{}).bits;
  a[1] = narrow_pair(low[2], low[3], T{}).bits;
  a[2] = narrow_pair(high[0], high[1], T{}).bits;
  a[3] = narrow_pair(high[2], high[3], T{}).bits;
}

// Both halves of what load_b_... gives.
template <class T>
__device__ __forceinline__ void multiply_both(float (&low)[4], float (&high)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  ptx::mma_m16n8k16<T>(low, a, first);
  ptx::mma_m16n8k16<T>(high, a, second);
}

}  // namespace pykern
