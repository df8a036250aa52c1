// What both kernels of the backward of prefix attention on sm_90a share: tiles in shared memory, how tensor copies fill
// them and how wgmma reads them, rings of stages between producer and consumers.
#pragma once

#include "kernels/attention/head_sizes.h"
#include "kernels/attention/scores.cuh"
#include "kernels/ptx/sm90.cuh"

namespace pykern {

// One parameter of both kernels; boxes of 64 rows and 64 columns everywhere.
struct PrefixAttentionBackwardSm90 {
  TensorMap q, grad_out, grad_q;  // with packed heads
  TensorMap k, v, grad_k, grad_v;
  PrefixAttentionBackward params;
  int group, heads_shift;  // query heads of a key head, and the logarithm of packed heads
  int shared_blocks;       // of the order of keys: the first that may be shared out
};

// Of the threads: a warpgroup that has tiles copied, of which one warp works, and two that multiply.
constexpr int kConsumers = 2;
constexpr int kBackwardThreads = (1 + kConsumers) * 128;
constexpr int kSharedLimit = 227 * 1024;

// --- tiles: panels of 64 columns, 128 bytes a row, swizzled; a panel's rows lie one behind the other -----------

constexpr int kPanelColumns = 64, kPanelRowBytes = 128, kBoxRows = 64;

__host__ __device__ constexpr int panels(int columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
__host__ __device__ constexpr int tile_bytes(int rows, int columns) { return panels(columns) * rows * kPanelRowBytes; }

// All boxes of a tile; columns and tokens beyond the tensor become zero. A box is 64 rows of `heads` heads each.
template <int rows, int columns>
__device__ __forceinline__ void load_tile(unsigned char* tile, const TensorMap& map, int head, int first_token,
                                          int heads_shift, uint64_t* mbarrier) {
#pragma unroll
  for (int panel = 0; panel < panels(columns); ++panel) {
#pragma unroll
    for (int box = 0; box < rows / kBoxRows; ++box) {
      ptx::tensor_load(tile + (panel * rows + box * kBoxRows) * kPanelRowBytes, map,
                       {panel * kPanelColumns, head, first_token + ((box * kBoxRows) >> heads_shift)}, mbarrier);
    }
  }
}

// Rows as m or n, columns as k.
__device__ __forceinline__ uint64_t rows_of(const unsigned char* tile) {
  ptx::MatrixDescriptor matrix;
  matrix.address = ptx::shared_address(tile);
  matrix.stride = 8 * kPanelRowBytes;
  matrix.swizzle = ptx::Swizzle::bytes128;
  return ptx::encode(matrix);
}

// Columns as n, rows as k, of a tile with `rows` rows.
__device__ __forceinline__ uint64_t columns_of(const unsigned char* tile, int rows) {
  ptx::MatrixDescriptor matrix;
  matrix.address = ptx::shared_address(tile);
  matrix.stride = 8 * kPanelRowBytes;
  matrix.leading = static_cast<uint32_t>(rows * kPanelRowBytes);
  matrix.swizzle = ptx::Swizzle::bytes128;
  return ptx::encode(matrix);
}

// d = a b^T over all columns: 64 rows of a tile of a_rows, by the rows of one of b_rows.
template <class T, int a_rows, int b_rows, int columns, int registers>
__device__ __forceinline__ void multiply_rows(float (&d)[registers], uint64_t a, uint64_t b) {
  static_assert(columns % 16 == 0 && registers * 2 == b_rows, "a product takes all rows of b");
#pragma unroll
  for (int k = 0; k < columns / 16; ++k) {
    const int panel = k / 4, within = k % 4 * 32;
    ptx::wgmma<T>(d, ptx::advance(a, static_cast<uint32_t>(panel * a_rows * kPanelRowBytes + within)),
                  ptx::advance(b, static_cast<uint32_t>(panel * b_rows * kPanelRowBytes + within)), k > 0);
  }
}

// d += a b: a from registers, its columns are the rows of b's tile.
template <class T, int steps, int registers>
__device__ __forceinline__ void accumulate_columns(float (&d)[registers], const uint32_t (&a)[steps][4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    ptx::wgmma<T, ptx::Major::mn>(d, a[k], ptx::advance(b, static_cast<uint32_t>(k * 16 * kPanelRowBytes)), true);
  }
}

template <int steps>
__device__ __forceinline__ void keep_in_place(uint32_t (&a)[steps][4]) {
#pragma unroll
  for (int k = 0; k < steps; ++k) ptx::keep_in_place(a[k]);
}

// Accumulators of a product become the first operand of the next.
template <class T, int n>
__device__ __forceinline__ void as_operand(const float (&s)[n], uint32_t (&a)[n / 8][4]) {
#pragma unroll
  for (int k = 0; k < n / 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = narrow_pair(s[8 * k + 2 * i], s[8 * k + 2 * i + 1], T{}).bits;
  }
}

// Zeros in those rows of a tile that select(row) names, by `threads` threads. What wgmma reads next needs
// fence_proxy_async by each of them and a barrier.
template <int rows, int columns, class Select>
__device__ __forceinline__ void clear_rows(unsigned char* tile, int thread, int threads, const Select& select) {
  constexpr int kChunks = kPanelRowBytes / 16;
  // Not unrolled, here and below: addresses computed before the loop over tiles would cost registers.
#pragma unroll 1
  for (int i = thread; i < rows * kChunks; i += threads) {
    const int row = i / kChunks;
    if (!select(row)) continue;
#pragma unroll 1
    for (int panel = 0; panel < panels(columns); ++panel) {
      auto* chunks = reinterpret_cast<Pack<uint32_t>*>(tile + (panel * rows + row) * kPanelRowBytes);
      chunks[i % kChunks] = Pack<uint32_t>{};
    }
  }
}

// A warpgroup's accumulators [64][columns] times a factor, as 64 rows of a tile of `rows`, for tensor copies to store.
// `counts` says of a thread's two rows whether they do: the others become zero whatever their accumulators hold.
template <class T, int rows, int columns>
__device__ __forceinline__ void write_tile(unsigned char* tile, const float (&d)[columns / 2], float factor,
                                           const bool (&counts)[2]) {
  const int lane = threadIdx.x % kWarpSize, row = threadIdx.x % 128 / kWarpSize * 16 + lane % 16;
#pragma unroll
  for (int t = 0; t < columns / 16; ++t) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r[i] = counts[i % 2] ? narrow_pair(d[8 * t + 2 * i] * factor, d[8 * t + 2 * i + 1] * factor, T{}).bits : 0u;
    }
    const int chunk = t % 4 * 2 + lane / 16;
    unsigned char* panel = tile + t / 4 * rows * kPanelRowBytes;
    ptx::stmatrix(panel + row * kPanelRowBytes + (chunk ^ row % 8) * 16, r);
  }
}

// By one thread, after fence_proxy_async of all that wrote and a barrier. What lies beyond the tensor is left out.
template <int rows, int columns>
__device__ __forceinline__ void store_tile(const TensorMap& map, int head, int first_token, const unsigned char* tile) {
#pragma unroll
  for (int panel = 0; panel < panels(columns); ++panel) {
    ptx::tensor_store(map, {panel * kPanelColumns, head, first_token}, tile + panel * rows * kPanelRowBytes);
  }
}

// Early, by one thread: a copy waits for its map.
__device__ __forceinline__ void prefetch_maps(const PrefixAttentionBackwardSm90& call) {
  ptx::prefetch_tensor_map(call.q);
  ptx::prefetch_tensor_map(call.grad_out);
  ptx::prefetch_tensor_map(call.k);
  ptx::prefetch_tensor_map(call.v);
}

// --- rings of stages --------------------------------------------------------------------------------------------

// Tile t is in stage t % stages. A stage is full when its producer has arrived and its copies have landed, empty when
// all consumer warps have arrived.
template <int stages>
struct Ring {
  static_assert((stages & (stages - 1)) == 0, "a power of two, so that one counter says everything");
  uint64_t full[stages], empty[stages];

  static __device__ __forceinline__ int stage(int tile) { return tile & (stages - 1); }

  // By one thread, before fence_mbarrier_init and a barrier.
  __device__ __forceinline__ void init() {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], kConsumers * 4);
    }
  }
  __device__ __forceinline__ void wait_empty(int tile) {
    ptx::mbarrier_wait(&empty[stage(tile)], static_cast<uint32_t>(tile / stages % 2 ^ 1));
  }
  __device__ __forceinline__ void wait_full(int tile) {
    ptx::mbarrier_wait(&full[stage(tile)], static_cast<uint32_t>(tile / stages % 2));
  }
  // By every thread of a consumer warp: it reads the stage no more.
  __device__ __forceinline__ void release(int tile) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&empty[stage(tile)]);
  }
};

// What a tile holds for the two consumer warpgroups, as the producer tells them.
struct alignas(16) TileNote {
  int32_t first_token;
  Visible visible[kConsumers];
  bool clears;  // has rows to be zeroed before a product reads them
  bool last;    // no tile: there are no more
};

}  // namespace pykern
