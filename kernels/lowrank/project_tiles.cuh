// The tiles of low that blocks compute, whatever the architecture: how large they are, where they lie, and where their
// sums go.
#pragma once

#include "kernels/common/device.h"
#include "kernels/lowrank/project.h"

namespace pykern::lowrank {

// Rows and columns of low that a block computes, and the rows of G and P that a stage holds.
struct ProjectTile {
  int rank, length, depth;
};

constexpr __host__ __device__ ProjectTile project_tile(int rank) { return {rank, 128, rank == 64 ? 64 : 32}; }
// As large as the registers of a multiprocessor allow, so that P and G are read seldom; or narrow, where blocks share
// the rows of G: the parts that they leave to be added are all multiprocessors' tiles.
constexpr __host__ __device__ ProjectTile project_tile_sm90(int rank, bool narrow) {
  return {rank, narrow || rank == 256 ? 128 : 256, 64};
}

__host__ __device__ __forceinline__ int64_t rank_tiles(const ProjectMatrix& m, int tile) {
  return m.rank > tile ? (m.rank + tile - 1) / tile : 1;
}
__host__ __device__ __forceinline__ int64_t length_tiles(const ProjectMatrix& m, int tile) {
  return (int64_t{m.length} + tile - 1) / tile;
}

// Of the two widths for 9.0, that with fewer ranks beyond the matrix's.
__host__ __device__ __forceinline__ int rank_tile_sm90(const ProjectMatrix& m) {
  const int beyond = m.rank % 256;
  return beyond > 0 && beyond <= 128 ? 128 : 256;
}

// What a block computes: neighbouring blocks have the tiles of low that read the same columns of G.
template <class Tiling>
struct ProjectPlace {
  int first_rank, first_column, split, first_step, steps;

  __device__ __forceinline__ ProjectPlace(const ProjectMatrix& m, unsigned tile) {
    const unsigned ranks = static_cast<unsigned>(rank_tiles(m, Tiling::kRank));
    const unsigned lengths = static_cast<unsigned>(length_tiles(m, Tiling::kLength));
    first_rank = static_cast<int>(tile % ranks) * Tiling::kRank;
    tile /= ranks;
    first_column = static_cast<int>(tile % lengths) * Tiling::kLength;
    split = static_cast<int>(tile / lengths);
    const int all = (m.n + Tiling::kDepth - 1) / Tiling::kDepth;
    first_step = static_cast<int>(int64_t{all} * split / m.splits);
    steps = static_cast<int>(int64_t{all} * (split + 1) / m.splits) - first_step;
  }
};

// Where sums go: the results, or the parts of a split [rank + 1, length], squares last.
struct ProjectTarget {
  float *low, *squares;
  float factor;  // on low; squares get its square

  __device__ __forceinline__ ProjectTarget(const ProjectMatrix& m, int split, float given)
      : low(static_cast<float*>(m.low)), squares(static_cast<float*>(m.squares)), factor(given) {
    if (m.splits > 1) {
      low = m.parts + int64_t{split} * (m.rank + 1) * m.length;
      squares = m.squares ? low + int64_t{m.rank} * m.length : nullptr;
      factor = 1;
    }
  }
};

__device__ __forceinline__ float gradient_factor(const float* grad_scale, bool maximize) {
  const float sign = maximize ? -1.0f : 1.0f;
  return grad_scale ? sign / *grad_scale : sign;
}

}  // namespace pykern::lowrank
