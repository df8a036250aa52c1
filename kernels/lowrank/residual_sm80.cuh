// Fira's residual: the moments and norms of every line, the limiter, and what is to be projected up.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/lowrank/adam_sm80.cuh"
#include "kernels/lowrank/residual.h"
#include "kernels/lowrank/update_sm80.cuh"

namespace pykern::lowrank {

constexpr double kNormEpsilon = 1e-8;
constexpr double kGrowthLimit = 1.01;
constexpr int kResidualWarps = kResidualThreads / kWarpSize;
constexpr int kSquaresInFlight = 4;

// The share of a line's square below which what the subspace leaves of it is rounding of the low-rank gradient.
__device__ __forceinline__ double rounding_share(double) { return 1e-14; }
__device__ __forceinline__ double rounding_share(float) { return 1e-5; }
__device__ __forceinline__ double rounding_share(f16) { return 1e-4; }
__device__ __forceinline__ double rounding_share(bf16) { return 1e-3; }

// --- squares of the gradient -------------------------------------------------------------------------

// A warp adds up a row.
template <class T, bool kPacks>
__global__ void __launch_bounds__(kResidualThreads) row_squares_kernel(ResidualParams params) {
  using C = Compute<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kResidualWarps + threadIdx.x / kWarpSize;
  if (row >= params.rows) return;
  const T* line = static_cast<const T*>(params.grad) + row * params.grad_stride;
  C sum = 0;
  int64_t begin = 0;
  if (kPacks) {
    constexpr int kSize = Pack<T>::kSize;
    constexpr int64_t kTurn = int64_t{kSquaresInFlight} * kWarpSize * kSize;
    for (; begin + kTurn <= params.columns; begin += kTurn) {
      Pack<T> packs[kSquaresInFlight];
#pragma unroll
      for (int i = 0; i < kSquaresInFlight; ++i) packs[i] = load_pack(line + begin + (i * kWarpSize + lane) * kSize);
#pragma unroll
      for (int i = 0; i < kSquaresInFlight; ++i) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum += widen(packs[i][e]) * widen(packs[i][e]);
      }
    }
  }
#pragma unroll 4
  for (int64_t column = begin + lane; column < params.columns; column += kWarpSize) {
    const C value = widen(line[column]);
    sum += value * value;
  }
  sum = warp_reduce(sum, Sum());
  if (lane == 0) static_cast<C*>(params.square_parts)[row] = sum;
}

template <class C, int kWidth>
struct ColumnSums {
  C values[kResidualWarps][kWarpSize * kWidth];
};

// A block adds up kSquareRows rows of some columns: each warp every eighth row, then all warps together.
template <class T, bool kPacks>
__global__ void __launch_bounds__(kResidualThreads)
    column_squares_kernel(ResidualParams params, unsigned column_blocks) {
  using C = Compute<T>;
  constexpr int kWidth = kPacks ? Pack<T>::kSize : 1, kColumns = kWarpSize * kWidth;
  using Sums = ColumnSums<C, kWidth>;
  PYKERN_SHARED(Sums, shared);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t part = blockIdx.x / column_blocks, column0 = int64_t{blockIdx.x % column_blocks} * kColumns;
  const int64_t column = column0 + lane * kWidth, row0 = part * kSquareRows;
  const int64_t rows = params.rows - row0 < kSquareRows ? params.rows - row0 : kSquareRows;
  C sums[kWidth] = {};
  // In packs the columns are a multiple of a pack's.
  if (column < params.columns) {
    const T* from = static_cast<const T*>(params.grad) + row0 * params.grad_stride + column;
#pragma unroll 4
    for (int64_t row = warp; row < rows; row += kResidualWarps) {
      Pack<T> pack;
      if (kPacks) {
        pack = load_pack(from + row * params.grad_stride);
      } else {
        pack[0] = from[row * params.grad_stride];
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sums[e] += widen(pack[e]) * widen(pack[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) shared.values[warp][lane * kWidth + e] = sums[e];
  __syncthreads();
  for (int i = threadIdx.x; i < kColumns; i += kResidualThreads) {
    C total = 0;
#pragma unroll
    for (int w = 0; w < kResidualWarps; ++w) total += shared.values[w][i];
    if (column0 + i < params.columns) {
      static_cast<C*>(params.square_parts)[part * params.columns + column0 + i] = total;
    }
  }
}

// --- moments and norms in the subspace ---------------------------------------------------------------

template <class C>
struct LineNorms {
  C direction = 0, low = 0, gram = 0;
};

template <class T>
__device__ __forceinline__ void measure_element(const ResidualParams& params, const AdamFactors<Compute<T>>& rule,
                                                int64_t index, LineNorms<Compute<T>>& norms) {
  using C = Compute<T>;
  C* first = static_cast<C*>(params.exp_avg) + index;
  C* second = static_cast<C*>(params.exp_avg_sq) + index;
  const C low = widen(static_cast<const T*>(params.low)[index]);
  const C gram = widen(static_cast<const T*>(params.low_gram)[index]);
  C m = *first, v = *second;
  advance(rule, rule.sign * low, m, v);
  *first = m;
  *second = v;
  const C direction = adam_direction(rule, m, v);
  norms.direction += direction * direction;
  norms.low += low * low;
  norms.gram += low * gram;
}

template <class C>
__device__ __forceinline__ void write_norms(const ResidualParams& params, int64_t line, const LineNorms<C>& norms) {
  static_cast<C*>(params.factors)[line] = sqrt(norms.direction) / (sqrt(norms.low) + static_cast<C>(kNormEpsilon));
  static_cast<C*>(params.low_squares)[line] = norms.low;
  static_cast<C*>(params.gram_squares)[line] = norms.gram;
}

// Right side: a warp takes a row.
template <class T>
__global__ void __launch_bounds__(kResidualThreads) measure_rows_kernel(ResidualParams params) {
  using C = Compute<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kResidualWarps + threadIdx.x / kWarpSize;
  if (row >= params.rows) return;
  const AdamFactors<C> rule = factors_of(*params.rule, C{});
  LineNorms<C> norms;
#pragma unroll 2
  for (int64_t k = lane; k < params.rank; k += kWarpSize) {
    measure_element<T>(params, rule, row * params.rank + k, norms);
  }
  norms.direction = warp_reduce(norms.direction, Sum());
  norms.low = warp_reduce(norms.low, Sum());
  norms.gram = warp_reduce(norms.gram, Sum());
  if (lane == 0) write_norms(params, row, norms);
}

template <class C>
struct NormSums {
  C values[3][kResidualWarps][kWarpSize];
};

// Left side: a lane takes a column, the warps share the rank.
template <class T>
__global__ void __launch_bounds__(kResidualThreads) measure_columns_kernel(ResidualParams params) {
  using C = Compute<T>;
  PYKERN_SHARED(NormSums<C>, shared);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t column = int64_t{blockIdx.x} * kWarpSize + lane;
  const AdamFactors<C> rule = factors_of(*params.rule, C{});
  LineNorms<C> norms;
  if (column < params.columns) {
#pragma unroll 2
    for (int64_t k = warp; k < params.rank; k += kResidualWarps) {
      measure_element<T>(params, rule, k * params.columns + column, norms);
    }
  }
  shared.values[0][warp][lane] = norms.direction;
  shared.values[1][warp][lane] = norms.low;
  shared.values[2][warp][lane] = norms.gram;
  __syncthreads();
  if (warp == 0 && column < params.columns) {
    LineNorms<C> total;
#pragma unroll
    for (int w = 0; w < kResidualWarps; ++w) {
      total.direction += shared.values[0][w][lane];
      total.low += shared.values[1][w][lane];
      total.gram += shared.values[2][w][lane];
    }
    write_norms(params, column, total);
  }
}

// --- the limiter -----------------------------------------------------------------------------------

// A thread takes a line: its squared residual; a block leaves the sum of its lines.
template <class T>
__global__ void __launch_bounds__(kResidualThreads) line_residuals_kernel(ResidualParams params, int64_t parts) {
  using C = Compute<T>;
  PYKERN_SHARED(WarpValues<double>, shared);
  const int64_t lines = params.right ? params.rows : params.columns;
  const int64_t line = int64_t{blockIdx.x} * kResidualThreads + threadIdx.x;
  double square = 0;
  if (line < lines) {
    C gradient = 0;
    for (int64_t part = 0; part < parts; ++part) {
      gradient += static_cast<const C*>(params.square_parts)[part * lines + line];
    }
    const double factor = static_cast<const C*>(params.factors)[line];
    const double low = static_cast<const C*>(params.low_squares)[line];
    const double gram = static_cast<const C*>(params.gram_squares)[line];
    const double rest = gradient - 2 * params.removed * low + params.removed * params.removed * gram;
    // Rounding counts as nothing, lest the limiter hold later residuals to it.
    square = factor * factor * (rest < rounding_share(T{}) * gradient ? 0 : rest);
  }
  square = block_reduce(square, 0.0, Sum(), shared);
  if (threadIdx.x == 0) params.block_sums[blockIdx.x] = square;
}

// The factor on the residual of norm `norm`, and the norm to store.
struct Limited {
  double factor, norm;
};

__device__ __forceinline__ Limited limit_residual(double norm, double before, bool zero_norm_limits) {
  if (zero_norm_limits ? before < 0 : before <= 0) return {1.0, norm};
  const double growth = norm / (before + kNormEpsilon);
  const double limiter = (growth < kGrowthLimit ? kGrowthLimit : growth) / kGrowthLimit;
  return {1 / limiter, norm / limiter};
}

// Every block adds up the sums of all lines again, in the same order, and so needs no other block; the first
// one keeps the limit for the weight update and the norm for the next step.
template <class T>
__global__ void __launch_bounds__(kResidualThreads) combine_kernel(ResidualParams params, int64_t sums, Tiling tiling) {
  using C = Compute<T>;
  PYKERN_SHARED(WarpValues<double>, shared);
  double total = 0;
  for (int64_t i = threadIdx.x; i < sums; i += kResidualThreads) total += params.block_sums[i];
  total = block_reduce(total, 0.0, Sum(), shared);
  const Limited limited = limit_residual(sqrt(total), params.rule->norm_before, params.zero_norm_limits);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    write_number(params.residual_norm, sizeof(C) == sizeof(double), limited.norm);
    params.rule->limit = limited.factor;
  }

  const Place place = place_of_thread(tiling);
  const int64_t rows = params.right ? params.rows : params.rank, columns = params.right ? params.rank : params.columns;
  if (place.row >= rows || place.unit >= columns) return;
  const AdamFactors<C> rule = factors_of(*params.rule, C{});
  const int64_t index = place.row * columns + place.unit;
  const C factor = static_cast<const C*>(params.factors)[params.right ? place.row : place.unit];
  const C direction = adam_direction(rule, static_cast<const C*>(params.exp_avg)[index],
                                     static_cast<const C*>(params.exp_avg_sq)[index]);
  const C removed = static_cast<C>(params.removed) * (factor * static_cast<C>(limited.factor)) * rule.sign;
  const C low = widen(static_cast<const T*>(params.low)[index]);
  narrow(static_cast<C>(params.scale) * direction - removed * low, static_cast<T*>(params.combined)[index]);
}

}  // namespace pykern::lowrank
