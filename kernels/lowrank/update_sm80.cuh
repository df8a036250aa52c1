// The change of the weights: one pass over weight, update and, with a residual, gradient. Bound by memory.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/vector.cuh"
#include "kernels/lowrank/adam_sm80.cuh"
#include "kernels/lowrank/update.h"

namespace pykern::lowrank {

constexpr int kUpdateThreads = 256;
constexpr int kUpdateScalars = 4;  // elements of a thread where sixteen-byte accesses are not possible

// A block is a rectangle of threads, 2^log_width of them along a row; blocks are counted along the rows first. Their
// number has 32 bits, as a grid's has: a division in 64 would cost more than all the rest of a thread.
struct Tiling {
  int log_width;
  unsigned blocks_per_row;
};

struct Place {
  int64_t row, unit;
};

__device__ __forceinline__ Place place_of_thread(const Tiling& tiling) {
  const unsigned block_row = blockIdx.x / tiling.blocks_per_row, block = blockIdx.x - block_row * tiling.blocks_per_row;
  const int width = 1 << tiling.log_width;
  return {int64_t{block_row} * (kUpdateThreads >> tiling.log_width) + (threadIdx.x >> tiling.log_width),
          (int64_t{block} << tiling.log_width) + (threadIdx.x & (width - 1))};
}

template <class T, bool kResidual>
struct WeightRow {
  using C = Compute<T>;

  const WeightUpdateParams& params;
  const AdamFactors<C> rule;
  T* const weights;
  const T* const updates;
  const T* const gradients;
  const C scale, residual_scale;
  C row_factor = 0;

  __device__ __forceinline__ WeightRow(const WeightUpdateParams& p, int64_t row)
      : params(p),
        rule(factors_of(*p.rule, C{})),
        weights(static_cast<T*>(p.param) + row * p.param_stride),
        updates(static_cast<const T*>(p.update) + row * p.columns),
        gradients(kResidual ? static_cast<const T*>(p.grad) + row * p.grad_stride : nullptr),
        scale(static_cast<C>(p.scale)),
        residual_scale(kResidual ? static_cast<C>(p.rule->limit) * rule.sign : C(0)) {
    if (kResidual && p.factor_per_row) row_factor = static_cast<const C*>(p.factors)[row] * residual_scale;
  }

  __device__ __forceinline__ C changed(T weight, T update, T gradient, C factor) const {
    C direction = scale * widen(update);
    if (kResidual) direction += factor * widen(gradient);
    return changed_weight(rule, static_cast<C>(widen(weight)), direction);
  }

  __device__ __forceinline__ void scalar(int64_t column) const {
    C factor = row_factor;
    if (kResidual && !params.factor_per_row) factor = static_cast<const C*>(params.factors)[column] * residual_scale;
    narrow(changed(weights[column], updates[column], kResidual ? gradients[column] : T{}, factor), weights[column]);
  }

  __device__ __forceinline__ void pack(int64_t column) const {
    constexpr int kSize = Pack<T>::kSize, kFactors = Pack<C>::kSize;
    Pack<T> weight = load_pack<Reuse::stream>(weights + column);
    const Pack<T> update = load_pack<Reuse::stream>(updates + column);
    Pack<T> gradient{};
    if (kResidual) gradient = load_pack<Reuse::stream>(gradients + column);
#pragma unroll
    for (int part = 0; part < kSize / kFactors; ++part) {
      Pack<C> factors;
      if (kResidual && !params.factor_per_row) {
        factors = load_pack(static_cast<const C*>(params.factors) + column + part * kFactors);
      }
#pragma unroll
      for (int i = 0; i < kFactors; ++i) {
        const int e = part * kFactors + i;
        const C factor = kResidual && !params.factor_per_row ? factors[i] * residual_scale : row_factor;
        narrow(changed(weight[e], update[e], gradient[e], factor), weight[e]);
      }
    }
    store_pack<Reuse::stream>(weights + column, weight);
  }
};

template <class T, bool kPacks, bool kResidual>
__global__ void __launch_bounds__(kUpdateThreads) weight_update_kernel(WeightUpdateParams params, Tiling tiling) {
  const Place place = place_of_thread(tiling);
  if (place.row >= params.rows) return;
  const WeightRow<T, kResidual> row(params, place.row);
  if (kPacks) {
    constexpr int kSize = Pack<T>::kSize;
    const int64_t column = place.unit * kSize;
    if (column + kSize <= params.columns) {
      row.pack(column);
    } else {
      for (int64_t rest = column; rest < params.columns; ++rest) row.scalar(rest);
    }
  } else {
    // Neighbouring threads take neighbouring elements.
    const int64_t width = int64_t{1} << tiling.log_width, block = place.unit >> tiling.log_width;
    const int64_t first = block * width * kUpdateScalars + (place.unit & (width - 1));
#pragma unroll
    for (int e = 0; e < kUpdateScalars; ++e) {
      const int64_t column = first + e * width;
      if (column < params.columns) row.scalar(column);
    }
  }
}

}  // namespace pykern::lowrank
