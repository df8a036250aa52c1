// low = P^T G by cp.async, ldmatrix and mma.m16n8k16, with the squares of G's columns from the same tiles: up to a rank
// of 256 the gradient is read once. Bound by memory up to ranks of about 128 on 8.0.
#pragma once

#include "kernels/lowrank/project_call.h"
#include "kernels/lowrank/project_tiles.cuh"
#include "kernels/lowrank/tile_sm80.cuh"

namespace pykern::lowrank {

constexpr int kProjectThreads = 256;
constexpr int kProjectWarps = kProjectThreads / kWarpSize;

// A block has `rank` rows of low. As deep a stage as leaves room for two blocks of a multiprocessor; the widest one
// fills a multiprocessor's registers alone.
template <int rank>
struct ProjectTiling {
  static constexpr int kRank = rank, kLength = project_tile(rank).length, kDepth = project_tile(rank).depth;
  static constexpr int kStages = rank == 64 ? 3 : 4;
  static constexpr int kBlocks = rank == 256 ? 1 : 2;  // of a multiprocessor, at least
  static constexpr int kWarpsAcross = rank == 256 ? 2 : 4, kWarpsDown = kProjectWarps / kWarpsAcross;
  static constexpr int kWarpRank = rank / kWarpsDown, kWarpLength = kLength / kWarpsAcross;
  static constexpr int kBasisBytes = 2 * kDepth * rank;
  static constexpr int kStageBytes = kBasisBytes + 2 * kDepth * kLength;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024, "what 8.6, 8.9 and 12.0 have");
};

// Sums of squares of the columns whose operands B a warp reads; the warps that read the same ones take turns.
template <class T, int kColumnBlocks>
struct ColumnSquares {
  float values[2 * kColumnBlocks];

  __device__ __forceinline__ void add(const uint32_t (&b)[kColumnBlocks][4]) {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float low = first(Pair<T>{b[j][e]}), high = second(Pair<T>{b[j][e]});
        values[2 * j + e / 2] += low * low + high * high;
      }
    }
  }
};

template <class T, class Tiling, bool along_length>
class Projection {
  static constexpr int kDepth = Tiling::kDepth, kRowBlocks = Tiling::kWarpRank / 16;
  static constexpr int kColumnBlocks = Tiling::kWarpLength / 16;
  // Rows of G's tile are G's rows, or its columns where those lie along memory.
  static constexpr int kGradientColumns = along_length ? Tiling::kLength : kDepth;

 public:
  __device__ __forceinline__ Projection(const ProjectMatrix& m, const ProjectPlace<Tiling>& place,
                                        unsigned char* shared)
      : basis_(m.projector, m.rank, m.n, m.rank),
        gradient_(m.matrix, m.stride, along_length ? m.n : m.length, along_length ? m.length : m.n),
        place_(place),
        shared_(shared) {}

  template <class Sums, class Squares>
  __device__ __forceinline__ void run(Sums& sums, Squares& squares, bool with_squares) const {
#pragma unroll
    for (int stage = 0; stage < Tiling::kStages - 1; ++stage) copy(stage, stage);
    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < place_.steps; ++step) {
      ptx::cp_async_wait<Tiling::kStages - 2>();
      __syncthreads();
      const int last = stage == 0 ? Tiling::kStages - 1 : stage - 1;
      copy(step + Tiling::kStages - 1, last);
      multiply(stage, step, sums, squares, with_squares);
      stage = stage + 1 == Tiling::kStages ? 0 : stage + 1;
    }
  }

 private:
  // A step that isn't there is a group of copies without copies.
  __device__ __forceinline__ void copy(int step, int stage) const {
    if (step < place_.steps) {
      unsigned char* const basis = shared_ + stage * Tiling::kStageBytes;
      unsigned char* const gradient = basis + Tiling::kBasisBytes;
      const int row = (place_.first_step + step) * kDepth;
      copy_tile<kDepth, Tiling::kRank, kProjectThreads>(basis, basis_, row, place_.first_rank);
      if (along_length) {
        copy_tile<kDepth, Tiling::kLength, kProjectThreads>(gradient, gradient_, row, place_.first_column);
      } else {
        copy_tile<Tiling::kLength, kDepth, kProjectThreads>(gradient, gradient_, place_.first_column, row);
      }
    }
    ptx::cp_async_commit();
  }

  template <class Sums, class Squares>
  __device__ __forceinline__ void multiply(int stage, int step, Sums& sums, Squares& squares, bool with_squares) const {
    const unsigned char* const basis = shared_ + stage * Tiling::kStageBytes;
    const unsigned char* const gradient = basis + Tiling::kBasisBytes;
    const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const unsigned down = warp / Tiling::kWarpsAcross, across = warp % Tiling::kWarpsAcross;
    const LaneAddress<Tiling::kRank> a_lane(lane % 8 + lane / 16 * 8, down * (Tiling::kWarpRank / 8) + lane / 8 % 2);
    const unsigned column = across * Tiling::kWarpLength;
    const LaneAddress<kGradientColumns> b_lane(along_length ? lane % 16 : column + lane % 8 + lane / 16 * 8,
                                               along_length ? column / 8 + lane / 16 : lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[kRowBlocks][4], b[kColumnBlocks][4];
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) ptx::ldmatrix<4, true>(a[i], a_lane.at(basis, 16 * k, i));
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
        if (along_length) {
          ptx::ldmatrix<4, true>(b[j], b_lane.at(gradient, 16 * k, j));
        } else {
          ptx::ldmatrix<4>(b[j], b_lane.at(gradient, 16 * j, k));
        }
      }
      sums.template add<T>(a, b);
      if (with_squares && (step * (kDepth / 16) + k) % Tiling::kWarpsDown == static_cast<int>(down)) squares.add(b);
    }
  }

  const Rows<T> basis_, gradient_;
  const ProjectPlace<Tiling>& place_;
  unsigned char* const shared_;
};

template <class T, int rank_tile, bool along_length>
__global__ void __launch_bounds__(kProjectThreads, ProjectTiling<rank_tile>::kBlocks)
    project_kernel(const __grid_constant__ ProjectCall call) {
  using Tiling = ProjectTiling<rank_tile>;
  constexpr int kRowBlocks = Tiling::kWarpRank / 16, kColumnBlocks = Tiling::kWarpLength / 16;
  PYKERN_DYNAMIC_SHARED(shared);
  const int index = call.table.find(blockIdx.x);
  const ProjectMatrix& m = call.table.matrix[index];
  const ProjectPlace<Tiling> place(m, blockIdx.x - call.table.first_tile[index]);
  const bool with_squares = m.squares != nullptr && place.first_rank == 0;

  WarpSums<kRowBlocks, kColumnBlocks> sums;
  ColumnSquares<T, kColumnBlocks> squares{};
  sums.clear();
  Projection<T, Tiling, along_length>(m, place, shared).run(sums, squares, with_squares);

  const ProjectTarget target(m, place.split, gradient_factor(call.grad_scale, call.maximize));
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int down = warp / Tiling::kWarpsAcross, across = warp % Tiling::kWarpsAcross;
  const bool pairs = m.length % 2 == 0 && reinterpret_cast<uintptr_t>(target.low) % 8 == 0;
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = place.first_rank + down * Tiling::kWarpRank + 16 * i + 8 * half + lane / 4;
      if (row >= m.rank) continue;
      float* const line = target.low + int64_t{row} * m.length;
#pragma unroll
      for (int j = 0; j < 2 * kColumnBlocks; ++j) {
        const int column = place.first_column + across * Tiling::kWarpLength + 8 * j + lane % 4 * 2;
        const float left = target.factor * sums.values[i][j][2 * half];
        const float right = target.factor * sums.values[i][j][2 * half + 1];
        if (pairs && column < m.length) {
          *reinterpret_cast<FloatPair*>(line + column) = {left, right};
        } else {
          if (column < m.length) line[column] = left;
          if (column + 1 < m.length) line[column + 1] = right;
        }
      }
    }
  }
  if (!with_squares) return;

  // The lanes of a column, then the warps that took turns.
  ptx::cp_async_wait_all();
  __syncthreads();
  float* const parts = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int j = 0; j < 2 * kColumnBlocks; ++j) {
    float sum = squares.values[j];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    if (lane % 4 == 0) parts[down * Tiling::kLength + across * Tiling::kWarpLength + 8 * j + lane / 4] = sum;
  }
  __syncthreads();
  const int column = place.first_column + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= Tiling::kLength || column >= m.length) return;
  float total = 0;
#pragma unroll
  for (int w = 0; w < Tiling::kWarpsDown; ++w) total += parts[w * Tiling::kLength + threadIdx.x];
  target.squares[column] = target.factor * target.factor * total;
}

// --- the parts of split matrices ---------------------------------------------------------------------------

constexpr int kPartElements = 4;  // of a thread, neighbouring threads' elements being neighbours

__host__ __device__ __forceinline__ int64_t part_elements(const ProjectMatrix& m) {
  return (int64_t{m.rank} + (m.squares != nullptr ? 1 : 0)) * m.length;
}

__global__ void __launch_bounds__(kProjectThreads) project_parts_kernel(const __grid_constant__ ProjectCall call) {
  const int index = call.table.find(blockIdx.x);
  const ProjectMatrix& m = call.table.matrix[index];
  const float factor = gradient_factor(call.grad_scale, call.maximize);
  const int64_t lows = int64_t{m.rank} * m.length, elements = part_elements(m), stride = lows + m.length;
  const int64_t begin = int64_t{blockIdx.x - call.table.first_tile[index]} * kProjectThreads * kPartElements;
#pragma unroll
  for (int e = 0; e < kPartElements; ++e) {
    const int64_t element = begin + e * kProjectThreads + threadIdx.x;
    if (element >= elements) return;
    float sum = 0;
#pragma unroll 4
    for (int split = 0; split < m.splits; ++split) sum += m.parts[split * stride + element];
    if (element < lows) {
      static_cast<float*>(m.low)[element] = factor * sum;
    } else {
      static_cast<float*>(m.squares)[element - lows] = factor * factor * sum;
    }
  }
}

}  // namespace pykern::lowrank
