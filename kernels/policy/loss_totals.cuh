// What a token counts in the aggregate, sums of blocks, and what the last block makes of them.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/policy/loss_tokens.cuh"

namespace pykern {

// --- the aggregate --------------------------------------------------------------------------------------------------

template <class T>
class LossShares {
 public:
  __device__ __forceinline__ explicit LossShares(const LossArguments<T>& arguments)
      : p_(arguments.params), counted_(arguments.counted) {}

  // What each token of the part's sequence counts in the loss.
  __device__ __forceinline__ double of_token(const LossPart& part) const {
    const double length = counted_ ? length_of(part.sequence) : static_cast<double>(part.sequence_tokens);
    const double sequences = static_cast<double>(
        counted_ && !p_.count_empty ? static_cast<int64_t>(p_.counters[kNonEmptySequences]) : p_.sequences);
    switch (p_.aggregate) {
      case LossAggregate::token_mean: return over(p_.denominator, tokens());
      case LossAggregate::token_sum: return 1;
      case LossAggregate::sequence_sum: return over(p_.denominator, sequences);
      case LossAggregate::sequence_mean: return length > 0 ? over(p_.denominator, sequences) / length : 0;
      case LossAggregate::sequence_sum_norm: return over(p_.denominator, sequences) / p_.horizon;
    }
    return 0;
  }

  // Of a sequence whose tokens were counted.
  __device__ __forceinline__ double length_of(int64_t sequence) const {
    return static_cast<double>(static_cast<int64_t>(p_.counters[kSequenceLengths + sequence]));
  }

  __device__ __forceinline__ double tokens() const {
    return static_cast<double>(counted_ ? static_cast<int64_t>(p_.counters[kUnmaskedTokens]) : p_.tokens);
  }

 private:
  __device__ __forceinline__ static double over(double denominator, double counted) {
    const double divisor = denominator > 0 ? denominator : counted;
    return divisor > 0 ? 1 / divisor : 0;
  }

  const LossParams& p_;
  const bool counted_;
};

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

// --- loss and metrics -----------------------------------------------------------------------------------------------

// For the first of BlockSum, or for all.
template <int count>
struct LossShared {
  BlockTotals<count> totals;
  double sums[kBlockSums];
  bool last;
};

template <class T, int count>
__device__ __forceinline__ void write_metrics(const LossArguments<T>& arguments, const double* sums) {
  const LossParams& p = arguments.params;
  const double tokens = LossShares<T>(arguments).tokens(), per_token = tokens > 0 ? 1 / tokens : 0;
  const double policy = sums[kWeightedPolicy];
  // An estimate that is only told may be infinite.
  const double kl = p.bounds.kl_coef == 0 ? 0 : sums[kWeightedKl] * p.bounds.kl_coef;
  const double anchor = sums[kWeightedAnchor] * p.bounds.anchor_coef;
  const double entropy = -sums[kWeightedEntropy] * p.bounds.entropy_coef;
  const double values[kLossMetrics] = {policy,
                                       kl,
                                       anchor,
                                       entropy,
                                       sums[kKl] * per_token,
                                       sums[kAnchor] * per_token,
                                       sums[kEntropy] * per_token,
                                       sums[kRatio] * per_token,
                                       -sums[kLogRatio] * per_token,
                                       (sums[kClippedLow] + sums[kClippedHigh]) * per_token,
                                       sums[kClippedLow] * per_token,
                                       sums[kClippedHigh] * per_token,
                                       sums[kDualClipped] * per_token,
                                       sums[kRolloutWeight] * per_token,
                                       (count > kKept ? sums[kKept] : tokens) * per_token};
#pragma unroll
  for (int i = 0; i < kLossMetrics; ++i) static_cast<T*>(p.metrics)[i] = static_cast<T>(values[i]);
  *static_cast<T*>(p.loss) = static_cast<T>(policy + kl + anchor + entropy);
}

// The block that finishes last adds up the sums of all, in a fixed order.
template <class T, int count>
__device__ __forceinline__ void finish_loss(const LossArguments<T>& arguments, double (&sums)[count],
                                            LossShared<count>& shared) {
  const LossParams& p = arguments.params;
  block_totals(sums, shared.totals,
               [&](int index, double sum) { p.block_sums[int64_t{blockIdx.x} * count + index] = sum; });
  if (threadIdx.x == 0) {
    __threadfence();
    shared.last = atomicAdd(&p.counters[kFinishedBlocks], 1ull) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  if (threadIdx.x < kBlockSums) shared.sums[threadIdx.x] = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) sums[i] = 0;
  for (int64_t block = threadIdx.x; block < gridDim.x; block += kLossThreads) {
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] += __ldcg(p.block_sums + block * count + i);
  }
  block_totals(sums, shared.totals, [&](int index, double sum) { shared.sums[index] = sum; });
  if (threadIdx.x == 0) write_metrics<T, count>(arguments, shared.sums);
}

}  // namespace pykern
