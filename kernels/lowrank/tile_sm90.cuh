// What the kernels for compute capability 9.0a share: tiles of panels that one thread has copied, several stages
// ahead, and that warpgroups multiply.
#pragma once

#include "kernels/lowrank/panels.h"
#include "kernels/ptx/sm90.cuh"

namespace pykern::lowrank {

constexpr int kWarpgroupThreads = 128;

// --- tiles ---------------------------------------------------------------------------------------------------

// `columns` are those that lie along memory.
template <int rows, int columns>
struct PanelTile {
  static_assert(rows % 8 == 0 && rows <= 256 && columns % kPanelElements == 0, "a panel is one copy");
  static constexpr int kRows = rows, kColumns = columns, kPanels = columns / kPanelElements;
  static constexpr int kPanelBytes = rows * kPanelRowBytes, kBytes = kPanels * kPanelBytes;

  // On the host: rows and columns are the matrix's.
  template <class T>
  static const char* map(TensorMap& map, const void* data, int64_t stride, int64_t matrix_rows,
                         int64_t matrix_columns) {
    const TensorLayout layout{
        data, 2, {matrix_columns, matrix_rows}, {1, stride}, {kPanelElements, rows}, ptx::Swizzle::bytes128};
    return make_tensor_map<T>(map, layout);
  }

  // By one thread. kBytes land, zeros behind the matrix's last row and column.
  static __device__ __forceinline__ void load(unsigned char* tile, const TensorMap& map, int row, int column,
                                              uint64_t* full) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::tensor_load(tile + panel * kPanelBytes, map, {column + panel * kPanelElements, row}, full);
    }
  }

  // By one thread, after fence_proxy_async of all that wrote and a barrier; the caller commits and waits. What lies
  // behind the matrix's last row and column is left out.
  static __device__ __forceinline__ void store(const unsigned char* tile, const TensorMap& map, int row, int column) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::tensor_store(map, {column + panel * kPanelElements, row}, tile + panel * kPanelBytes);
    }
  }
};

// A tile as an operand of wgmma. With Major::k its rows are m or n, with Major::mn its columns are.
template <class Tile, ptx::Major major>
class PanelOperand {
 public:
  __device__ __forceinline__ explicit PanelOperand(const unsigned char* tile) {
    ptx::MatrixDescriptor matrix;
    matrix.address = ptx::shared_address(tile);
    matrix.leading = major == ptx::Major::mn ? Tile::kPanelBytes : 0;
    matrix.stride = 8 * kPanelRowBytes;
    matrix.swizzle = ptx::Swizzle::bytes128;
    descriptor_ = encode(matrix);
  }

  // The same tile of a stage `bytes` further on.
  __device__ __forceinline__ PanelOperand further(int bytes) const {
    PanelOperand moved = *this;
    moved.descriptor_ = ptx::advance(descriptor_, static_cast<uint32_t>(bytes));
    return moved;
  }

  // 16 * `step` along k and 64 * `block` along m or n from the tile's origin.
  __device__ __forceinline__ uint64_t at(int step, int block = 0) const {
    constexpr int kSteps = kPanelElements / 16;
    const int bytes = major == ptx::Major::mn
                          ? block * Tile::kPanelBytes + step * 16 * kPanelRowBytes
                          : block * 64 * kPanelRowBytes + step / kSteps * Tile::kPanelBytes + step % kSteps * 32;
    return ptx::advance(descriptor_, static_cast<uint32_t>(bytes));
  }

 private:
  uint64_t descriptor_;
};

// Starts sums[i] += a b for the 64 rows of m from 64 * (first_block + i), over a depth of k. The caller fences before,
// commits and waits.
template <class T, ptx::Major a_major, ptx::Major b_major, int depth, int blocks, int registers, class A, class B>
__device__ __forceinline__ void multiply_panels(float (&sums)[blocks][registers], const PanelOperand<A, a_major>& a,
                                                const PanelOperand<B, b_major>& b, int first_block) {
#pragma unroll
  for (int step = 0; step < depth / 16; ++step) {
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
      ptx::wgmma<T, a_major, b_major>(sums[i], a.at(step, first_block + i), b.at(step), true);
    }
  }
}

template <int blocks, int registers>
__device__ __forceinline__ void keep_sums_in_place(float (&sums)[blocks][registers]) {
#pragma unroll
  for (int i = 0; i < blocks; ++i) ptx::keep_in_place(sums[i]);
}

// --- stages --------------------------------------------------------------------------------------------------

// The stage of a step, counted from the block's first, and the parity of its phases.
template <int stages>
struct StageTurn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A stage is full when the copying thread has arrived and its copies have landed, empty when all reading warps have
// released it.
template <int stages>
struct StageRing {
  using Turn = StageTurn<stages>;
  uint64_t full[stages], empty[stages];

  // By one thread, before a barrier of the block.
  __device__ __forceinline__ void init(int reading_warps) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], static_cast<uint32_t>(reading_warps));
    }
    ptx::fence_mbarrier_init();
  }

  // By the copying thread: waits for an empty stage and says how many bytes will land. Copies report to the result.
  __device__ __forceinline__ uint64_t* begin(const Turn& turn, int bytes) {
    ptx::mbarrier_wait(&empty[turn.stage], turn.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(&full[turn.stage], static_cast<uint32_t>(bytes));
    return &full[turn.stage];
  }

  __device__ __forceinline__ void wait_full(const Turn& turn) { ptx::mbarrier_wait(&full[turn.stage], turn.parity); }

  // By all threads of a reading warp, after their reads and the wait for their products.
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&empty[stage]);
  }
};

}  // namespace pykern::lowrank
