// A row belongs to a warp where it is short, else to a block. It is read once from memory, and again from the cache.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/offload/group.cuh"
#include "kernels/offload/norm.h"

namespace pykern {

constexpr int kNormThreads = 256;
// Longer rows have a block each.
constexpr int64_t kNormWarpColumns = 1024;

template <int row_threads>
__device__ __forceinline__ float row_sum(float value, WarpValues<float>& shared) {
  if constexpr (row_threads == kWarpSize) {
    return warp_reduce(value, Sum());
  } else {
    return block_reduce(value, 0.0f, Sum(), shared);
  }
}

// One element of a weight or bias that may be missing.
template <class T, bool packed>
__device__ __forceinline__ Group<T, packed> load_or(const T* source, int64_t column, float otherwise) {
  if (source != nullptr) return Group<T, packed>::load(source + column);
  Group<T, packed> group;
#pragma unroll
  for (int i = 0; i < Group<T, packed>::kSize; ++i) group.values[i] = otherwise;
  return group;
}

template <class T, int row_threads, bool packed>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(NormParams params) {
  using Values = Group<T, packed>;
  constexpr int kSize = Values::kSize, kRows = kNormThreads / row_threads;
  PYKERN_SHARED(WarpValues<float>, shared);
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / row_threads, columns = params.columns;
  if (row >= params.rows) return;
  const int64_t begin = static_cast<int64_t>(threadIdx.x % row_threads) * kSize, step = row_threads * kSize;
  const T* x = static_cast<const T*>(params.x) + row * columns;
  const float inverse = 1.0f / static_cast<float>(columns);

  float mean = 0;
  if (params.mean != nullptr) {
    float sum = 0;
#pragma unroll 4
    for (int64_t column = begin; column < columns; column += step) {
      const Values values = Values::load(x + column);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum += values.values[i];
    }
    mean = row_sum<row_threads>(sum, shared) * inverse;
  }
  float squares = 0;
#pragma unroll 4
  for (int64_t column = begin; column < columns; column += step) {
    const Values values = Values::load(x + column);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float centred = values.values[i] - mean;
      squares += centred * centred;
    }
  }
  const float rstd = 1.0f / __fsqrt_rn(row_sum<row_threads>(squares, shared) * inverse + params.eps);
  T* y = static_cast<T*>(params.y) + row * columns;
#pragma unroll 2
  for (int64_t column = begin; column < columns; column += step) {
    Values values = Values::load(x + column);
    const Values weight = load_or<T, packed>(static_cast<const T*>(params.weight), column, 1.0f);
    const Values bias = load_or<T, packed>(static_cast<const T*>(params.bias), column, 0.0f);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values.values[i] = (values.values[i] - mean) * rstd * weight.values[i] + bias.values[i];
    }
    values.store(y + column);
  }
  if (threadIdx.x % row_threads == 0) {
    params.rstd[row] = rstd;
    if (params.mean != nullptr) params.mean[row] = mean;
  }
}

// Blocks take rows a grid apart. A thread sums the same columns of all of its rows, in shared memory where
// `sums_shared` says that they fit, else in the block's part of `partial`.
template <class T, int row_threads, bool packed>
__global__ void __launch_bounds__(kNormThreads) norm_backward_kernel(NormBackwardParams params, bool sums_shared) {
  using Values = Group<T, packed>;
  constexpr int kSize = Values::kSize, kRows = kNormThreads / row_threads;
  PYKERN_DYNAMIC_SHARED(dynamic);
  PYKERN_SHARED(WarpValues<float>, shared);
  const int64_t columns = params.columns;
  const int64_t begin = static_cast<int64_t>(threadIdx.x % row_threads) * kSize, step = row_threads * kSize;
  const bool wants_weight = params.grad_weight != nullptr, wants_bias = params.grad_bias != nullptr;
  const int64_t wanted = (wants_weight ? 1 : 0) + (wants_bias ? 1 : 0);
  float* part = params.partial + int64_t{blockIdx.x} * wanted * columns;
  float* sums = sums_shared ? reinterpret_cast<float*>(dynamic) + threadIdx.x / row_threads * wanted * columns : part;
  float* bias_sums = sums + (wants_weight ? columns : 0);
  for (int64_t column = begin; column < columns; column += step) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (wants_weight) sums[column + i] = 0;
      if (wants_bias) bias_sums[column + i] = 0;
    }
  }

  const float inverse = 1.0f / static_cast<float>(columns);
  const T* weight_row = static_cast<const T*>(params.weight);
#pragma unroll 1
  for (int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / row_threads; row < params.rows;
       row += int64_t{gridDim.x} * kRows) {
    const T* x = static_cast<const T*>(params.x) + row * columns;
    const T* grad = static_cast<const T*>(params.grad) + row * columns;
    const float mean = params.mean != nullptr ? params.mean[row] : 0.0f, rstd = params.rstd[row];
    float along = 0, plain = 0;
#pragma unroll (packed ? 2 : 1)
    for (int64_t column = begin; column < columns; column += step) {
      const Values values = Values::load(x + column), grads = Values::load(grad + column);
      const Values weight = load_or<T, packed>(weight_row, column, 1.0f);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float normal = (values.values[i] - mean) * rstd, weighted = grads.values[i] * weight.values[i];
        along += weighted * normal;
        plain += weighted;
        if (wants_weight) sums[column + i] += grads.values[i] * normal;
        if (wants_bias) bias_sums[column + i] += grads.values[i];
      }
    }
    along = row_sum<row_threads>(along, shared) * inverse;
    plain = params.mean != nullptr ? row_sum<row_threads>(plain, shared) * inverse : 0.0f;
    T* grad_x = static_cast<T*>(params.grad_x) + row * columns;
#pragma unroll (packed ? 2 : 1)
    for (int64_t column = begin; column < columns; column += step) {
      Values values = Values::load(x + column);
      const Values grads = Values::load(grad + column), weight = load_or<T, packed>(weight_row, column, 1.0f);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float normal = (values.values[i] - mean) * rstd;
        values.values[i] = rstd * (grads.values[i] * weight.values[i] - plain - normal * along);
      }
      values.store(grad_x + column);
    }
  }

  if (!sums_shared) return;
  __syncthreads();
  const float* all = reinterpret_cast<const float*>(dynamic);
#pragma unroll 1
  for (int64_t place = threadIdx.x; place < wanted * columns; place += kNormThreads) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) sum += all[i * wanted * columns + place];
    part[place] = sum;
  }
}

constexpr int kNormSumColumns = 32;
constexpr int kNormSumParts = kNormThreads / kNormSumColumns;

// Adds the blocks' sums up, always in the same order.
template <class T>
__global__ void __launch_bounds__(kNormThreads) norm_columns_kernel(NormBackwardParams params, int64_t blocks) {
  struct Sums {
    float values[kNormSumParts][kNormSumColumns];
  };
  PYKERN_SHARED(Sums, shared);
  const int lane = threadIdx.x % kNormSumColumns, share = threadIdx.x / kNormSumColumns;
  const bool wants_weight = params.grad_weight != nullptr, wants_bias = params.grad_bias != nullptr;
  const int64_t places = params.columns * ((wants_weight ? 1 : 0) + (wants_bias ? 1 : 0));
  const int64_t place = int64_t{blockIdx.x} * kNormSumColumns + lane;
  float sum = 0;
  if (place < places) {
#pragma unroll 4
    for (int64_t block = share; block < blocks; block += kNormSumParts) sum += params.partial[block * places + place];
  }
  shared.values[share][lane] = sum;
  __syncthreads();
  if (share != 0 || place >= places) return;
  for (int i = 1; i < kNormSumParts; ++i) sum += shared.values[i][lane];
  const bool of_weight = wants_weight && place < params.columns;
  T* target = static_cast<T*>(of_weight ? params.grad_weight : params.grad_bias);
  narrow(sum, target[of_weight || !wants_weight ? place : place - params.columns]);
}

}  // namespace pykern
