// The residual's factors on the gradient's columns, its norm, the limiter, and what is to be projected up.
//
// A block of threads takes a strip of columns of a matrix [rank, length] over all the rank: eight threads lie side by
// side on a row, 32 rows below each other. A thread's columns are neighbours where sixteen-byte accesses are possible,
// else neighbouring threads have neighbouring columns.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/lowrank/compute.cuh"
#include "kernels/lowrank/grouped.h"
#include "kernels/lowrank/ratios.h"

namespace pykern::lowrank {

constexpr double kNormEpsilon = 1e-8;
constexpr int kRatioThreads = 256;
constexpr int kRatioWarps = kRatioThreads / kWarpSize;
constexpr int kStripRows = kRatioThreads / kStripThreads;  // rows that a block has at a time
constexpr int kSumThreads = 128;

using RatioTable = GroupedTable<RatioMatrix>;

// The share of a column's square below which a difference of squares is rounding: it counts as nothing, lest the
// limiter hold later residuals to it.
__device__ __forceinline__ double rounding_share(double) { return 1e-14; }
__device__ __forceinline__ double rounding_share(float) { return 1e-5; }

// A thread's columns in its strip.
template <class C>
struct Strip {
  static constexpr int kWidth = Pack<C>::kSize;
  const bool packs;
  const int64_t first, length;  // the strip's first column

  __device__ __forceinline__ Strip(const RatioMatrix& matrix, uint32_t strip)
      : packs(matrix.packs), first(int64_t{strip} * kStripThreads * kWidth), length(matrix.length) {}

  __device__ __forceinline__ int64_t column(int e) const {
    const int thread = threadIdx.x % kStripThreads;
    return first + (packs ? thread * kWidth + e : e * kStripThreads + thread);
  }

  // Of a row: zero beyond its end. In packs the length is a multiple of a pack.
  __device__ __forceinline__ Pack<C> load(const C* row) const {
    Pack<C> values{};
    if (packs) {
      if (column(0) < length) values = load_pack(row + column(0));
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (column(e) < length) values[e] = row[column(e)];
      }
    }
    return values;
  }

  __device__ __forceinline__ void store(C* row, const Pack<C>& values) const {
    if (packs) {
      if (column(0) < length) store_pack(row + column(0), values);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (column(e) < length) row[column(e)] = values[e];
      }
    }
  }
};

// Sums over the rank of each column of a strip, one of each warp.
template <class C>
struct StripSums {
  C values[3][kRatioWarps][kStripThreads * Pack<C>::kSize];
};

template <class C, bool kGram>
__global__ void __launch_bounds__(kRatioThreads)
    column_ratios_kernel(const __grid_constant__ RatioTable table, const __grid_constant__ RatioParams params) {
  constexpr int kWidth = Pack<C>::kSize, kColumns = kStripThreads * kWidth;
  PYKERN_SHARED(StripSums<C>, shared);
  const int found = table.find(blockIdx.x);
  const RatioMatrix& matrix = table.matrix[found];
  const uint32_t number = blockIdx.x - table.first_tile[found];
  const Strip<C> strip(matrix, number);
  const C* low = static_cast<const C*>(matrix.low);
  const C* gram = static_cast<const C*>(matrix.low_gram);
  const C* direction = static_cast<const C*>(matrix.direction);

  // |N|^2, |R|^2 and R^T P^T P R of each column.
  C sums[3][kWidth] = {};
#pragma unroll 2
  for (int64_t row = threadIdx.x / kStripThreads; row < matrix.rank; row += kStripRows) {
    const Pack<C> n = strip.load(direction + row * matrix.length), r = strip.load(low + row * matrix.length);
    Pack<C> g{};
    if (kGram) g = strip.load(gram + row * matrix.length);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      sums[0][e] += n[e] * n[e];
      sums[1][e] += r[e] * r[e];
      if (kGram) sums[2][e] += r[e] * g[e];
    }
  }
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int which = 0; which < (kGram ? 3 : 2); ++which) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      C sum = sums[which][e];
#pragma unroll
      for (int distance = kStripThreads; distance < kWarpSize; distance *= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, distance);
      }
      if (lane < kStripThreads) {
        shared.values[which][warp][static_cast<int>(strip.column(e) - strip.first)] = sum;
      }
    }
  }
  __syncthreads();
  if (warp > 0) return;

  // The first warp: a column for each lane.
  double direction_square = 0, low_square = 0, gram_square = 0, residual_square = 0;
  const int64_t column = strip.first + lane;
  if (lane < kColumns && column < matrix.length) {
#pragma unroll
    for (int w = 0; w < kRatioWarps; ++w) {
      direction_square += static_cast<double>(shared.values[0][w][lane]);
      low_square += static_cast<double>(shared.values[1][w][lane]);
      if (kGram) gram_square += static_cast<double>(shared.values[2][w][lane]);
    }
    if (!kGram) gram_square = low_square;
    const double phi = params.per_tensor ? 1.0 : sqrt(direction_square) / (sqrt(low_square) + kNormEpsilon);
    const double square = static_cast<double>(static_cast<const C*>(matrix.squares)[column]);
    double rest = square;
    if (params.removes) {
      rest += params.removed * (params.removed * gram_square - 2 * low_square);
      if (rest < rounding_share(C{}) * square) rest = 0;
    }
    residual_square = phi * phi * rest;
    static_cast<C*>(matrix.ratios)[column] = static_cast<C>(phi);
  }
  direction_square = warp_reduce(direction_square, Sum());
  low_square = warp_reduce(low_square, Sum());
  residual_square = warp_reduce(residual_square, Sum());
  if (lane == 0) {
    double* const strip_sums = matrix.strip_sums + int64_t{number} * 3;
    strip_sums[0] = direction_square;
    strip_sums[1] = low_square;
    strip_sums[2] = residual_square;
  }
}

// What phi is multiplied by, and the residual's norm to store.
struct Limited {
  double factor, norm;
};

__device__ __forceinline__ Limited limit_residual(const RatioParams& params, const double* sums, bool limits,
                                                  double before) {
  double factor = params.amplitude_first ? params.amplitude : 1.0;
  if (params.per_tensor) factor *= sqrt(sums[0]) / (sqrt(sums[1]) + kNormEpsilon);
  double norm = factor * sqrt(sums[2]);
  const bool known = params.zero_norm_limits ? !(before < 0) : !(before <= 0);
  if (limits && known) {
    // A NaN stays one.
    const double grown = norm / (before + kNormEpsilon);
    const double limiter = (grown < params.growth ? params.growth : grown) / params.growth;
    factor /= limiter;
    norm /= limiter;
  }
  if (!params.amplitude_first) factor *= params.amplitude;
  return {factor, norm};
}

// A block takes a matrix: it adds up the sums of its strips if `from_strips`, always in the same order, and resolves
// the limit if `limits`.
template <class C>
__global__ void __launch_bounds__(kSumThreads)
    residual_limit_kernel(const __grid_constant__ RatioTable table, const __grid_constant__ RatioParams params,
                          bool from_strips, bool limits) {
  PYKERN_SHARED(WarpValues<double>, shared);
  const RatioMatrix& matrix = table.matrix[blockIdx.x];
  double sums[3] = {};
  if (from_strips) {
    const int64_t count = (matrix.length + Strip<C>::kWidth * kStripThreads - 1) / (Strip<C>::kWidth * kStripThreads);
    for (int64_t strip = threadIdx.x; strip < count; strip += kSumThreads) {
#pragma unroll
      for (int which = 0; which < 3; ++which) sums[which] += matrix.strip_sums[strip * 3 + which];
    }
#pragma unroll
    for (int which = 0; which < 3; ++which) sums[which] = block_reduce(sums[which], 0.0, Sum(), shared);
  }
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int which = 0; which < 3; ++which) {
    if (from_strips) {
      matrix.sums[which] = sums[which];
    } else {
      sums[which] = matrix.sums[which];
    }
  }
  if (!limits) return;
  C* const stored = static_cast<C*>(matrix.residual_norm);
  const bool limited = stored != nullptr && params.growth > 0;
  const Limited result = limit_residual(params, sums, limited, limited ? static_cast<double>(*stored) : 0.0);
  *matrix.limit = result.factor;
  if (limited && !is_set(params.found_inf)) *stored = static_cast<C>(result.norm);
}

template <class C>
__global__ void __launch_bounds__(kRatioThreads)
    combine_kernel(const __grid_constant__ RatioTable table, const __grid_constant__ RatioParams params) {
  constexpr int kWidth = Pack<C>::kSize;
  const int found = table.find(blockIdx.x);
  const RatioMatrix& matrix = table.matrix[found];
  const Strip<C> strip(matrix, blockIdx.x - table.first_tile[found]);
  const C limit = static_cast<C>(*matrix.limit);
  Pack<C> factors = strip.load(static_cast<const C*>(matrix.ratios));
#pragma unroll
  for (int e = 0; e < kWidth; ++e) factors[e] *= limit;
  // All threads have read phi before the factors take its place.
  __syncthreads();
  if (threadIdx.x < kStripThreads) {
    const C scale = params.grad_scale != nullptr ? static_cast<C>(*params.grad_scale) : C(1);
    Pack<C> signed_factors;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) signed_factors[e] = factors[e] / (params.maximize ? -scale : scale);
    strip.store(static_cast<C*>(matrix.ratios), signed_factors);
  }
  if (!params.removes) return;
  const C scale = static_cast<C>(params.scale);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) factors[e] *= static_cast<C>(params.removed);
#pragma unroll 2
  for (int64_t row = threadIdx.x / kStripThreads; row < matrix.rank; row += kStripRows) {
    C* const direction = static_cast<C*>(matrix.direction) + row * matrix.length;
    Pack<C> n = strip.load(direction);
    const Pack<C> r = strip.load(static_cast<const C*>(matrix.low) + row * matrix.length);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) n[e] = scale * n[e] - factors[e] * r[e];
    strip.store(direction, n);
  }
}

}  // namespace pykern::lowrank
