// Moments of the tokens that count, and whitening by them. Sums are doubles, of distances from one of a thread's own
// values, so an offset of the values costs no digits.
#pragma once

#include <cmath>

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/policy/token_quads.cuh"
#include "kernels/policy/whiten.h"

namespace pykern {

// Few blocks of many threads: the last block merges the moments of one block per thread.
constexpr int kMomentThreads = 512;
constexpr int kWhitenThreads = 256;

struct TokenMoments {
  double count, low, high, mean, squares;  // squares of the distances from the mean
};

// Of all threads' moments, in one fixed order; all threads must call.
__device__ __forceinline__ TokenMoments merge_moments(const TokenMoments& mine, WarpValues<double>& shared) {
  TokenMoments all;
  all.count = block_reduce(mine.count, 0.0, Sum{}, shared);
  all.low = block_reduce(mine.low, HUGE_VAL, Smallest{}, shared);
  all.high = block_reduce(mine.high, -HUGE_VAL, Largest{}, shared);
  const double share = mine.count > 0 ? mine.count / all.count : 0;
  all.mean = block_reduce(mine.count > 0 ? mine.mean * share : 0.0, 0.0, Sum{}, shared);
  const double distance = mine.mean - all.mean;
  const double squares = mine.count > 0 ? mine.squares + mine.count * distance * distance : 0.0;
  all.squares = block_reduce(squares, 0.0, Sum{}, shared);
  return all;
}

template <class T>
__device__ __forceinline__ TokenMoments thread_moments(const WhitenParams& p, bool packs) {
  const T* values = static_cast<const T*>(p.values);
  T low = static_cast<T>(HUGE_VAL), high = -low;
  double pivot = 0, sum = 0, squares = 0;
  int64_t count = 0;
  const int64_t step = int64_t{kQuad} * blockDim.x * gridDim.x;
  for (int64_t token = kQuad * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x); token < p.tokens; token += step) {
    const unsigned inside = quad_inside(token, 0, p.tokens);
    const unsigned counts = p.mask ? quad_unmasked(p.mask + token, inside, packs) : inside;
    T four[kQuad];
    load_quad(values + token, counts, packs, four);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (!(counts >> i & 1)) continue;
      if (count == 0) pivot = static_cast<double>(four[i]);
      const double distance = static_cast<double>(four[i]) - pivot;
      sum += distance;
      squares += distance * distance;
      low = four[i] < low ? four[i] : low;
      high = four[i] > high ? four[i] : high;
      ++count;
    }
  }
  TokenMoments moments{static_cast<double>(count), static_cast<double>(low), static_cast<double>(high), 0, 0};
  if (count > 0) {
    const double offset = sum / moments.count;
    moments.mean = pivot + offset;
    moments.squares = squares - offset * sum;
  }
  return moments;
}

// Equal values whiten to exactly zero, or stay; a NaN or infinity among them does not hide.
__device__ __forceinline__ void write_whitening(const WhitenParams& p, const TokenMoments& all) {
  const bool finite = all.mean - all.mean == 0;
  double mean = all.mean, scale = 0;
  if (finite && !(all.low < all.high)) {
    mean = all.low;
  } else {
    if (finite) mean = mean < all.low ? all.low : mean > all.high ? all.high : mean;
    const double variance = (all.squares < 0 ? 0 : all.squares) / (all.count - p.ddof);
    scale = 1 / sqrt(variance + p.eps);
  }
  p.whitening[kWhiteningMean] = mean;
  p.whitening[kWhiteningScale] = scale;
  p.whitening[kWhiteningShift] = p.shift_mean ? 0 : mean;
}

template <class T>
__global__ void __launch_bounds__(kMomentThreads) whiten_moments_kernel(WhitenParams p, bool packs) {
  PYKERN_SHARED(WarpValues<double>, shared);
  PYKERN_SHARED(bool, last);
  const TokenMoments of_block = merge_moments(thread_moments<T>(p, packs), shared);
  if (threadIdx.x == 0) {
    double* numbers = p.moments + int64_t{blockIdx.x} * kWhitenNumbers;
    __stcg(numbers + kWhitenCount, of_block.count);
    __stcg(numbers + kWhitenLow, of_block.low);
    __stcg(numbers + kWhitenHigh, of_block.high);
    __stcg(numbers + kWhitenMean, of_block.mean);
    __stcg(numbers + kWhitenSquares, of_block.squares);
    __threadfence();
    last = atomicAdd(p.finished, 1ull) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  TokenMoments mine{0, HUGE_VAL, -HUGE_VAL, 0, 0};
  if (threadIdx.x < gridDim.x) {
    const double* numbers = p.moments + int64_t{threadIdx.x} * kWhitenNumbers;
    mine = {__ldcg(numbers + kWhitenCount), __ldcg(numbers + kWhitenLow), __ldcg(numbers + kWhitenHigh),
            __ldcg(numbers + kWhitenMean), __ldcg(numbers + kWhitenSquares)};
  }
  const TokenMoments all = merge_moments(mine, shared);
  if (threadIdx.x == 0) write_whitening(p, all);
}

template <class T>
__global__ void __launch_bounds__(kWhitenThreads) whiten_kernel(WhitenParams p, bool packs) {
  const double mean = p.whitening[kWhiteningMean], scale = p.whitening[kWhiteningScale],
               shift = p.whitening[kWhiteningShift];
  const int64_t step = int64_t{kQuad} * blockDim.x * gridDim.x;
  for (int64_t token = kQuad * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x); token < p.tokens; token += step) {
    const unsigned inside = quad_inside(token, 0, p.tokens);
    const unsigned counts = p.mask ? quad_unmasked(p.mask + token, inside, packs) : inside;
    T four[kQuad];
    load_quad(static_cast<const T*>(p.values) + token, counts, packs, four);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const double whitened = (static_cast<double>(four[i]) - mean) * scale + shift;
      four[i] = counts >> i & 1 ? static_cast<T>(whitened) : T(0);
    }
    store_quad(static_cast<T*>(p.result) + token, inside, packs, four);
  }
}

}  // namespace pykern
