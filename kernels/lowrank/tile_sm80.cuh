// Tiles of matrices in shared memory, whatever the matrices' sizes and alignment.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/shared_tile.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/ptx/sm80.cuh"

namespace pykern::lowrank {

// A matrix as it lies in memory.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int rows, columns;
  bool packs;  // whether sixteen-byte accesses are possible

  __device__ __forceinline__ Rows(const void* matrix, int64_t row_stride, int row_count, int column_count)
      : data(static_cast<const T*>(matrix)),
        stride(row_stride),
        rows(row_count),
        columns(column_count),
        packs(allows_packs(data, stride)) {}
};

// Copies a tile, with zeros behind the matrix's last row and column. Copies of packs are asynchronous, the caller
// commits them; other rows are copied element by element.
template <int tile_rows, int tile_columns, int threads, class T>
__device__ __forceinline__ void copy_tile(unsigned char* tile, const Rows<T>& source, int first_row, int first_column) {
  using Tile = SharedTile<tile_columns>;
  constexpr int kChunks = tile_columns / 8, kStep = threads / kChunks;
  static_assert(threads % kChunks == 0 && tile_rows % kStep == 0, "every thread copies as many chunks");
  const int thread = ptx::forget_origin(static_cast<int>(threadIdx.x));
  const int row = thread / kChunks, chunk = thread % kChunks, column = first_column + 8 * chunk;
  const int wanted = source.columns - column, across = wanted < 0 ? 0 : wanted < 8 ? wanted : 8;
  const T* const from = source.data + (first_row + row) * source.stride + column;
  if (source.packs) {
#pragma unroll
    for (int below = 0; below < tile_rows; below += kStep) {
      const int count = first_row + row + below < source.rows ? across : 0;
      ptx::cp_async<16>(tile + Tile::offset(row + below, chunk),
                        count > 0 ? from + below * source.stride : source.data, 2 * count);
    }
  } else {
#pragma unroll 1
    for (int below = 0; below < tile_rows; below += kStep) {
      const int count = first_row + row + below < source.rows ? across : 0;
      Pack<T> pack{};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) pack[e] = from[below * source.stride + e];
      }
      *reinterpret_cast<Pack<T>*>(tile + Tile::offset(row + below, chunk)) = pack;
    }
  }
}

struct alignas(8) FloatPair {
  float first, second;
};

// Sums of a warp over `kRowBlocks` times 16 rows and `kColumnBlocks` times 16 columns.
template <int kRowBlocks, int kColumnBlocks>
struct WarpSums {
  float values[kRowBlocks][2 * kColumnBlocks][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kColumnBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) values[i][j][e] = 0;
      }
    }
  }

  template <class T>
  __device__ __forceinline__ void add(const uint32_t (&a)[kRowBlocks][4], const uint32_t (&b)[kColumnBlocks][4]) {
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
        const uint32_t first[2] = {b[j][0], b[j][1]}, second[2] = {b[j][2], b[j][3]};
        ptx::mma_m16n8k16<T>(values[i][2 * j], a[i], first);
        ptx::mma_m16n8k16<T>(values[i][2 * j + 1], a[i], second);
      }
    }
  }
};

}  // namespace pykern::lowrank
