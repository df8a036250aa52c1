// rollout_correction; see rollout.h.
#pragma once

#include "kernels/policy/rollout.h"
#include "kernels/policy/token_batch.cuh"

namespace pykern {

struct RolloutShared {
  BlockSums<kTokenSums> tokens;
  BlockSums<kWeightSums> weights;
  WarpValues<double> values;
  double columns[kSequenceWarps][kPaddedColumns];
  SequenceVerdict verdict;
  bool last;
};

template <class T>
__device__ __forceinline__ void correct_sequence(const RolloutParams& p, int64_t sequence, RolloutShared& shared) {
  const T* const old = static_cast<const T*>(p.old_logprobs);
  const T* const rollout = static_cast<const T*>(p.rollout_logprobs);
  const bool per_token = p.rules.weight == RolloutWeight::token;
  T* const weights = static_cast<T*>(p.weights);
  const TokenRange range = sequence_range(p.batch, sequence);

  double sums[kTokenSums] = {};
  T largest[2] = {0, 0};
  for_tokens(p.batch, range, old, rollout, [&](int64_t, bool unmasked, T of_old, T of_rollout) {
    if (unmasked) measure_token(p.rules, of_old, of_rollout, sums, largest);
  });
  block_sums(sums, shared.tokens);
  const double largest_k2 = block_reduce(static_cast<double>(largest[0]), 0.0, Largest{}, shared.values);
  const double largest_k3 = block_reduce(static_cast<double>(largest[1]), 0.0, Largest{}, shared.values);
  if (threadIdx.x == 0) shared.verdict = judge_sequence(p.rules, shared.tokens.totals, largest_k2, largest_k3);
  __syncthreads();
  const SequenceVerdict verdict = shared.verdict;

  double of_weights[kWeightSums] = {};
  T extremes[2] = {static_cast<T>(-HUGE_VAL), static_cast<T>(HUGE_VAL)};
  for_tokens(p.batch, range, old, rollout, [&](int64_t token, bool unmasked, T of_old, T of_rollout) {
    TokenVerdict<T> of_token{T(0), false};
    if (unmasked) of_token = judge_token(p.rules, verdict, of_old, of_rollout, of_weights, extremes);
    p.keep[token] = of_token.keep;
    if (per_token) weights[token] = of_token.weight;
  });
  block_sums(of_weights, shared.weights);
  const double highest = block_reduce(static_cast<double>(extremes[0]), -HUGE_VAL, Largest{}, shared.values);
  const double lowest = block_reduce(static_cast<double>(extremes[1]), HUGE_VAL, Smallest{}, shared.values);
  if (threadIdx.x == 0) {
    const double weight = fill_columns(p.rules, shared.tokens.totals, verdict, shared.weights.totals, highest, lowest,
                                       p.columns + sequence * kPaddedColumns);
    if (weights && !per_token) weights[sequence] = static_cast<T>(weight);
  }
  __syncthreads();
}

// Each warp joins every eighth sequence, its lanes two columns each; then the warps' shares follow each other.
__device__ __forceinline__ void join_columns(const RolloutParams& p, RolloutShared& shared) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  double low = rollout_identity(lane), high = rollout_identity(lane + kWarpSize);
  for (int64_t sequence = warp; sequence < p.batch.sequences; sequence += kSequenceWarps) {
    const double* row = p.columns + sequence * kPaddedColumns;
    low = rollout_join(lane, low, __ldcg(row + lane));
    high = rollout_join(lane + kWarpSize, high, __ldcg(row + lane + kWarpSize));
  }
  shared.columns[warp][lane] = low;
  shared.columns[warp][lane + kWarpSize] = high;
  __syncthreads();
  if (threadIdx.x < kPaddedColumns) {
    const int column = threadIdx.x;
    double joined = shared.columns[0][column];
    for (int other = 1; other < kSequenceWarps; ++other) {
      joined = rollout_join(column, joined, shared.columns[other][column]);
    }
    shared.columns[0][column] = joined;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kSequenceThreads, 2) rollout_correction_kernel(RolloutParams p) {
  PYKERN_SHARED(RolloutShared, shared);
  for (int64_t sequence = blockIdx.x; sequence < p.batch.sequences; sequence += gridDim.x) {
    correct_sequence<T>(p, sequence, shared);
  }
  if (!is_last_block(p.finished, shared.last)) return;
  join_columns(p, shared);
  if (threadIdx.x == 0) {
    write_metrics(p.rules, shared.columns[0], static_cast<T*>(p.metrics));
    *p.divisor = rollout_divisor(p.rules, shared.columns[0]);
  }
}

template <class T>
__global__ void __launch_bounds__(kSequenceThreads) rollout_normalize_kernel(RolloutParams p, int64_t count) {
  T* const weights = static_cast<T*>(p.weights);
  const T divisor = static_cast<T>(*p.divisor);
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    weights[i] /= divisor;
  }
}

}  // namespace pykern
