// low = P^T G for compute capability 9.0a, with the squares of G's columns from the same tiles.
//
// A block stays on its multiprocessor and takes one tile of low after the other. One warp has tiles of P and G copied,
// several stages ahead and on into the next tile of low; two warpgroups multiply, each for its own columns of G, which
// are the rows of the product: the ranks of P are its columns. While the tensor cores work at a stage, the warps that
// wait for them add up the squares of its columns.
#pragma once

#include "kernels/lowrank/grouped.h"
#include "kernels/lowrank/project_tiles.cuh"
#include "kernels/lowrank/tile_sm90.cuh"

namespace pykern::lowrank {

// A matrix and the maps of its P and G.
struct ProjectSm90 {
  TensorMap basis, gradient;
  ProjectMatrix matrix;
};

struct ProjectCallSm90 {
  GroupedTable<ProjectSm90> table;
  const float* grad_scale;
  bool maximize;
};
static_assert(sizeof(ProjectCallSm90) <= 32764, "more than the parameters of a kernel hold");

constexpr int kProjectGroups = 2;  // that multiply
constexpr int kProjectThreadsSm90 = (1 + kProjectGroups) * kWarpgroupThreads;

template <int rank, bool narrow>
struct ProjectTilingSm90 {
  static constexpr ProjectTile kTile = project_tile_sm90(rank, narrow);
  static constexpr int kRank = rank, kLength = kTile.length, kDepth = kTile.depth;
  static constexpr int kGroupLength = kLength / kProjectGroups;
  static constexpr int kBlocks = kGroupLength / 64;  // of 64 columns of G that a warpgroup multiplies
  static_assert(kDepth == kPanelElements && kBlocks * 64 == kGroupLength, "whole panels");

  using Basis = PanelTile<kDepth, kRank>;
  template <bool along_length>
  using Gradient = PanelTile<along_length ? kDepth : kLength, along_length ? kLength : kDepth>;

  static constexpr int kStageBytes = Basis::kBytes + Gradient<true>::kBytes;
  static_assert(Gradient<true>::kBytes == Gradient<false>::kBytes, "either way");
  static constexpr int kSharedBytes = 192 * 1024, kStages = kSharedBytes / kStageBytes;
  using Ring = StageRing<kStages>;
};

// Sums of squares of a warpgroup's columns. A thread reads chunks of sixteen bytes, eight neighbouring threads those of
// eight neighbouring rows, or all of one row: they lie in all banks.
template <class T, class Tiling, bool along_length>
class PanelSquares;

template <class T>
__device__ __forceinline__ void squares_of_chunk(const unsigned char* chunk, float (&squares)[8]) {
  const Pack<uint32_t> pack = *reinterpret_cast<const Pack<uint32_t>*>(chunk);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = first(Pair<T>{pack[i]}), high = second(Pair<T>{pack[i]});
    squares[2 * i] = low * low;
    squares[2 * i + 1] = high * high;
  }
}

// A chunk is eight columns of a row of G: those of a thread's rows add up element by element.
template <class T, class Tiling>
class PanelSquares<T, Tiling, true> {
  static constexpr int kWarpChunks = 2 * Tiling::kBlocks, kRowGroups = 4 / kWarpChunks;

 public:
  __device__ __forceinline__ void add(const unsigned char* gradient, int group) {
    const int lane = threadIdx.x % kWarpSize, row = lane % 8, chunk = chunk_of(lane, group);
    const unsigned char* from = gradient + chunk / 8 * Tiling::template Gradient<true>::kPanelBytes +
                                (row + lane / 8 / kWarpChunks * 8) * kPanelRowBytes + (((chunk % 8) ^ row) << 4);
#pragma unroll
    for (int below = 0; below < Tiling::kDepth; below += 8 * kRowGroups) {
      float squares[8];
      squares_of_chunk<T>(from + below * kPanelRowBytes, squares);
#pragma unroll
      for (int e = 0; e < 8; ++e) values_[e] += squares[e];
    }
  }

  // The sum of one of the tile's columns, and which one it is; -1 for lanes that have none.
  __device__ __forceinline__ float finish(int group, int& column) const {
    const int lane = threadIdx.x % kWarpSize;
    float own = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float sum = values_[e];
      if (kRowGroups == 2) sum += __shfl_xor_sync(kFullWarp, sum, 16);
#pragma unroll
      for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(kFullWarp, sum, other);
      if (lane % 8 == e) own = sum;
    }
    column = lane / 8 < kWarpChunks ? 8 * chunk_of(lane, group) + lane % 8 : -1;
    return own;
  }

 private:
  __device__ static __forceinline__ int chunk_of(int lane, int group) {
    const int warp = static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpSize;
    return (4 * group + warp) * kWarpChunks + lane / 8 % kWarpChunks;
  }

  float values_[8] = {};
};

// A chunk is eight rows of a column of G: eight threads have a column.
template <class T, class Tiling>
class PanelSquares<T, Tiling, false> {
  static constexpr int kColumns = 4 * Tiling::kBlocks;  // of a thread

 public:
  __device__ __forceinline__ void add(const unsigned char* gradient, int group) {
    const int lane = threadIdx.x % kWarpSize, chunk = lane % 8, octet = lane / 8;
    const unsigned char* rows = gradient + (first_column(group) + octet) * kPanelRowBytes;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      float squares[8];
      squares_of_chunk<T>(rows + 4 * i * kPanelRowBytes + ((chunk ^ (octet + i % 2 * 4)) << 4), squares);
#pragma unroll
      for (int e = 0; e < 8; ++e) values_[i] += squares[e];
    }
  }

  __device__ __forceinline__ float finish(int group, int& column) const {
    const int lane = threadIdx.x % kWarpSize, octet = lane / 8;
    float own = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      float sum = values_[i];
#pragma unroll
      for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(kFullWarp, sum, other);
      if (lane % 8 == i) own = sum;
    }
    column = lane % 8 < kColumns ? first_column(group) + octet + 4 * (lane % 8) : -1;
    return own;
  }

 private:
  __device__ static __forceinline__ int first_column(int group) {
    const int warp = static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpSize;
    return group * Tiling::kGroupLength + warp * 4 * kColumns;
  }

  float values_[kColumns] = {};
};

// Calls action(matrix with its maps, place) for each tile of the block.
template <class Tiling, class Action>
__device__ __forceinline__ void for_each_tile(const ProjectCallSm90& call, const Action& action) {
#pragma unroll 1
  for (unsigned tile = blockIdx.x; tile < call.table.tiles; tile += gridDim.x) {
    const int index = call.table.find(tile);
    const ProjectSm90& entry = call.table.matrix[index];
    action(entry, ProjectPlace<Tiling>(entry.matrix, tile - call.table.first_tile[index]));
  }
}

// One thread: copies the stages of all tiles of the block.
template <class Tiling>
__device__ __forceinline__ void copy_stages(const ProjectCallSm90& call, unsigned char* shared,
                                            typename Tiling::Ring& ring) {
  using Basis = typename Tiling::Basis;
  typename Tiling::Ring::Turn turn;
  for_each_tile<Tiling>(call, [&](const ProjectSm90& entry, const ProjectPlace<Tiling>& place) {
    const bool along_length = entry.matrix.along_length;
#pragma unroll 1
    for (int step = 0; step < place.steps; ++step) {
      const int row = (place.first_step + step) * Tiling::kDepth;
      unsigned char* const basis = shared + turn.stage * Tiling::kStageBytes;
      unsigned char* const gradient = basis + Basis::kBytes;
      uint64_t* const full = ring.begin(turn, Tiling::kStageBytes);
      Basis::load(basis, entry.basis, row, place.first_rank, full);
      if (along_length) {
        Tiling::template Gradient<true>::load(gradient, entry.gradient, row, place.first_column, full);
      } else {
        Tiling::template Gradient<false>::load(gradient, entry.gradient, place.first_column, row, full);
      }
      turn.next();
    }
  });
}

// A thread's rows of the product are columns of low, its columns are ranks; eight lanes write 32 bytes.
template <class Tiling, int registers>
__device__ __forceinline__ void store_sums(const ProjectMatrix& m, const ProjectPlace<Tiling>& place,
                                           const ProjectTarget& target, int group,
                                           const float (&sums)[Tiling::kBlocks][registers]) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads, lane = thread % kWarpSize;
  const int first_column =
      place.first_column + group * Tiling::kGroupLength + thread / kWarpSize * 16 + lane / 4;
  const int first_rank = place.first_rank + lane % 4 * 2;
#pragma unroll
  for (int block = 0; block < Tiling::kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = first_column + 64 * block + 8 * half;
      if (column >= m.length) continue;
      float* const line = target.low + int64_t{first_rank} * m.length + column;
#pragma unroll
      for (int j = 0; j < registers / 4; ++j) {
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          const int below = 8 * j + right;
          if (first_rank + below >= m.rank) continue;
          line[int64_t{below} * m.length] = target.factor * sums[block][4 * j + 2 * half + right];
        }
      }
    }
  }
}

// A warpgroup: its columns of a tile of low.
template <class T, class Tiling, bool along_length>
__device__ __forceinline__ void project_tile(const ProjectMatrix& m, const ProjectPlace<Tiling>& place,
                                             const unsigned char* shared, typename Tiling::Ring& ring,
                                             typename Tiling::Ring::Turn& turn, float factor, int group) {
  using Basis = typename Tiling::Basis;
  constexpr ptx::Major kMajor = along_length ? ptx::Major::mn : ptx::Major::k;
  const PanelOperand<Basis, ptx::Major::mn> basis(shared);
  const PanelOperand<typename Tiling::template Gradient<along_length>, kMajor> gradient(shared + Basis::kBytes);
  const bool with_squares = m.squares != nullptr && place.first_rank == 0;
  float sums[Tiling::kBlocks][Tiling::kRank / 2] = {};
  PanelSquares<T, Tiling, along_length> squares;
  keep_sums_in_place(sums);
  int before = 0;
#pragma unroll 1
  for (int step = 0; step < place.steps; ++step) {
    const int offset = turn.stage * Tiling::kStageBytes;
    ring.wait_full(turn);
    ptx::wgmma_fence();
    multiply_panels<T, kMajor, ptx::Major::mn, Tiling::kDepth>(sums, gradient.further(offset), basis.further(offset),
                                                               group * Tiling::kBlocks);
    ptx::wgmma_commit();
    if (with_squares) squares.add(shared + Basis::kBytes + offset, group);
    ptx::wgmma_wait<1>();
    if (step > 0) ring.release(before);
    before = turn.stage;
    turn.next();
  }
  ptx::wgmma_wait<0>();
  keep_sums_in_place(sums);
  if (place.steps > 0) ring.release(before);

  const ProjectTarget target(m, place.split, factor);
  store_sums<Tiling>(m, place, target, group, sums);
  if (!with_squares) return;
  int column;
  const float sum = squares.finish(group, column);
  if (column >= 0 && place.first_column + column < m.length) {
    target.squares[place.first_column + column] = target.factor * target.factor * sum;
  }
}

template <class T, int rank, bool narrow>
__global__ void __launch_bounds__(kProjectThreadsSm90, 1)
    project_sm90_kernel(const __grid_constant__ ProjectCallSm90 call) {
  using Tiling = ProjectTilingSm90<rank, narrow>;
  PYKERN_DYNAMIC_SHARED(shared);
  PYKERN_SHARED(typename Tiling::Ring, ring);
  if (threadIdx.x == 0) ring.init(kProjectGroups * kWarpgroupThreads / kWarpSize);
  __syncthreads();
  const int group = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0) - 1;
  if (group < 0) {
    ptx::decrease_registers<40>();
    if (threadIdx.x == 0) copy_stages<Tiling>(call, shared, ring);
  } else {
    ptx::increase_registers<232>();
    const float factor = gradient_factor(call.grad_scale, call.maximize);
    typename Tiling::Ring::Turn turn;
    for_each_tile<Tiling>(call, [&](const ProjectSm90& entry, const ProjectPlace<Tiling>& place) {
      if (entry.matrix.along_length) {
        project_tile<T, Tiling, true>(entry.matrix, place, shared, ring, turn, factor, group);
      } else {
        project_tile<T, Tiling, false>(entry.matrix, place, shared, ring, turn, factor, group);
      }
    });
  }
}

}  // namespace pykern::lowrank
