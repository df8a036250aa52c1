// A block for each sequence of a batch: its tokens, and sums over them in one fixed order.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/policy/last_block.cuh"
#include "kernels/policy/token_batch.h"

namespace pykern {

constexpr int kSequenceThreads = 256;
constexpr int kSequenceWarps = kSequenceThreads / kWarpSize;

struct TokenRange {
  int64_t begin, end;
};

__device__ __forceinline__ TokenRange sequence_range(const TokenBatch& batch, int64_t sequence) {
  if (!batch.cu_seqlens) return {sequence * batch.columns, (sequence + 1) * batch.columns};
  // Nobody has checked them: wrong ones may give wrong results, but no access elsewhere.
  const int64_t begin = batch.cu_seqlens[sequence], end = batch.cu_seqlens[sequence + 1];
  return {begin < 0 ? 0 : begin, end < batch.tokens ? end : batch.tokens};
}

// Calls `visit(token, unmasked, first, second)` for the tokens of a sequence, with the token's value in either array;
// the threads of the block take turns. Several tokens are read before the first is used, so that reads overlap.
template <class T, class Visit>
__device__ __forceinline__ void for_tokens(const TokenBatch& batch, const TokenRange& range, const T* first,
                                           const T* second, Visit visit) {
  constexpr int kAtOnce = 4;
  for (int64_t start = range.begin + threadIdx.x; start < range.end; start += kAtOnce * kSequenceThreads) {
    T of_first[kAtOnce], of_second[kAtOnce];
    bool unmasked[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t token = start + i * kSequenceThreads;
      const bool inside = token < range.end;
      of_first[i] = inside ? first[token] : T(0);
      of_second[i] = inside ? second[token] : T(0);
      unmasked[i] = inside && (!batch.mask || batch.mask[token]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t token = start + i * kSequenceThreads;
      if (token < range.end) visit(token, unmasked[i], of_first[i], of_second[i]);
    }
  }
}

template <int kCount>
struct BlockSums {
  double of_warp[kSequenceWarps][kCount];
  double totals[kCount];
};

// Sums over a block of kSequenceThreads, in `shared.totals` for all of its threads until the next call.
template <int kCount>
__device__ __forceinline__ void block_sums(const double (&values)[kCount], BlockSums<kCount>& shared) {
  static_assert(kCount <= kSequenceThreads, "a thread for each sum");
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int index = 0; index < kCount; ++index) {
    const double sum = warp_reduce(values[index], Sum{});
    if (lane == 0) shared.of_warp[warp][index] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kCount) {
    double sum = 0;
    for (int other = 0; other < kSequenceWarps; ++other) sum += shared.of_warp[other][threadIdx.x];
    shared.totals[threadIdx.x] = sum;
  }
  __syncthreads();
}

}  // namespace pykern
