// What the kernels of policy_loss share: parts of sequences, masks as bits, four tokens per thread, sums.
#pragma once

#include <cmath>

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/policy/loss.h"

namespace pykern {

constexpr int kLossThreads = 128;
constexpr int kThreadTokens = 4;
// Parts of a sequence meet at multiples of it, so that each word of the mask's bits belongs to one part.
constexpr int64_t kTileTokens = kLossThreads * kThreadTokens;

template <class T>
struct LossArguments {
  LossParams params;
  LossBounds<T> bounds;
  bool packs;    // all pointers to tokens allow sixteen-byte accesses
  bool counted;  // the counters hold what they are meant to
};

// --- parts of sequences -------------------------------------------------------------------------------------

struct LossPart {
  int64_t sequence, index, begin, end;
  int64_t sequence_tokens;  // masked or not
};

__device__ __forceinline__ int64_t sequence_start(const LossParams& p, int64_t sequence) {
  if (!p.cu_seqlens) return sequence * p.columns;
  // Nobody has checked them: a wrong one may give a wrong loss, but no access elsewhere.
  const int64_t start = p.cu_seqlens[sequence];
  return start < 0 ? 0 : start < p.tokens ? start : p.tokens;
}

__device__ __forceinline__ LossPart find_part(const LossParams& p, int64_t item) {
  LossPart part;
  part.sequence = item / p.grid.parts;
  part.index = item - part.sequence * p.grid.parts;
  const int64_t start = sequence_start(p, part.sequence), stop = sequence_start(p, part.sequence + 1);
  const int64_t first_tile = start / kTileTokens, last_tile = (stop + kTileTokens - 1) / kTileTokens;
  const int64_t share = (last_tile - first_tile + p.grid.parts - 1) / p.grid.parts * kTileTokens;
  const int64_t from = first_tile * kTileTokens + part.index * share;
  part.begin = from > start ? from : start;
  part.end = from + share < stop ? from + share : stop;
  part.sequence_tokens = stop > start ? stop - start : 0;
  return part;
}

// --- four tokens of a thread, a bit each -----------------------------------------------------------------------

__device__ __forceinline__ unsigned tokens_inside(const LossPart& part, int64_t token) {
  if (token >= part.begin && token + kThreadTokens <= part.end) return 0xfu;
  unsigned inside = 0;
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) inside |= (token + i >= part.begin && token + i < part.end ? 1u : 0u) << i;
  return inside;
}

// Which of four bytes are not zero.
__device__ __forceinline__ unsigned nonzero_bytes(uint32_t bytes) {
  const uint32_t ones = ((((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u) >> 7;
  return (ones * 0x01020408u) >> 24 & 0xfu;
}

__device__ __forceinline__ uint32_t* mask_word(const LossParams& p, const LossPart& part, int64_t token) {
  return p.mask_bits + (token / 32 + part.sequence);
}

__device__ __forceinline__ unsigned tokens_unmasked(const LossParams& p, const LossPart& part, int64_t token) {
  const unsigned inside = tokens_inside(part, token);
  if (!p.mask || !inside) return inside;
  return inside & (*mask_word(p, part, token) >> (token % 32));
}

template <class T>
struct FourTokens {
  T values[kThreadTokens];
  __device__ __forceinline__ T& operator[](int index) { return values[index]; }
  __device__ __forceinline__ const T& operator[](int index) const { return values[index]; }
};

// The wanted ones; zeros in the place of the others, whatever is there.
template <class T>
__device__ __forceinline__ FourTokens<T> read_tokens(const LossArguments<T>& arguments, const void* array, int64_t token,
                                                     unsigned wanted) {
  FourTokens<T> result;
  const T* source = static_cast<const T*>(array) + token;
  if (wanted && arguments.packs && token + kThreadTokens <= arguments.params.tokens) {
#pragma unroll
    for (int i = 0; i < kThreadTokens; i += Pack<T>::kSize) {
      const Pack<T> pack = load_pack<Reuse::stream>(source + i);
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; ++j) result[i + j] = wanted >> (i + j) & 1 ? pack[j] : T(0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) result[i] = wanted >> i & 1 ? source[i] : T(0);
  }
  return result;
}

template <class T>
__device__ __forceinline__ void write_tokens(const LossArguments<T>& arguments, void* array, int64_t token,
                                             unsigned inside, const FourTokens<T>& values) {
  T* target = static_cast<T*>(array) + token;
  if (inside == 0xfu && arguments.packs) {
#pragma unroll
    for (int i = 0; i < kThreadTokens; i += Pack<T>::kSize) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; ++j) pack[j] = values[i + j];
      store_pack(target + i, pack);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      if (inside >> i & 1) target[i] = values[i];
    }
  }
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exponential(float value) { return expf(value); }
__device__ __forceinline__ double exponential(double value) { return exp(value); }

// A NaN stays NaN in it.
template <class T>
__device__ __forceinline__ T clamp(T value, T low, T high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// min(exp(old_logprob - rollout_logprob), bound)
template <class T>
__device__ __forceinline__ T rollout_weight(T old_logprob, T rollout_logprob, T bound) {
  const T weight = exponential(old_logprob - rollout_logprob);
  return weight > bound ? bound : weight;
}

// --- sums of a block ------------------------------------------------------------------------------------------------

template <int count>
struct BlockTotals {
  double of_warp[kLossThreads / kWarpSize][count];
};

// Adds up the block's values in one fixed order, and hands each sum to one thread: `store(index, sum)`.
template <int count, class Store>
__device__ __forceinline__ void block_totals(double (&values)[count], BlockTotals<count>& shared, Store store) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const double sum = warp_reduce(values[i], Sum{});
    if (lane == 0) shared.of_warp[warp][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x < count) {
    double sum = 0;
    for (int other = 0; other < kLossThreads / kWarpSize; ++other) sum += shared.of_warp[other][threadIdx.x];
    store(static_cast<int>(threadIdx.x), sum);
  }
  __syncthreads();
}

}  // namespace pykern
