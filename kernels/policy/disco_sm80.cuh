// disco_loss; see disco.h.
#pragma once

#include <cmath>

#include "kernels/policy/disco.h"
#include "kernels/policy/token_batch.cuh"

namespace pykern {

__device__ __forceinline__ float expm1_of(float value) { return expm1f(value); }
__device__ __forceinline__ double expm1_of(double value) { return expm1(value); }
__device__ __forceinline__ float exp_of(float value) { return expf(value); }
__device__ __forceinline__ double exp_of(double value) { return exp(value); }

// exp(d) - d - 1, which cancels near zero.
template <class T>
__device__ __forceinline__ T divergence_k3(T d, T ratio) {
  return d > T(-0.5) && d < T(0.5) ? expm1_of(d) - d : ratio - d - 1;
}

template <class T>
__global__ void __launch_bounds__(kSequenceThreads) disco_scores_kernel(DiscoParams p) {
  PYKERN_SHARED(BlockSums<kDiscoSums>, shared);
  const T* const logprobs = static_cast<const T*>(p.logprobs);
  const T* const old = static_cast<const T*>(p.old_logprobs);
  for (int64_t sequence = blockIdx.x; sequence < p.batch.sequences; sequence += gridDim.x) {
    double sums[kDiscoSums] = {};
    const TokenRange range = sequence_range(p.batch, sequence);
    for_tokens(p.batch, range, logprobs, old, [&](int64_t, bool unmasked, T logprob, T was) {
      if (!unmasked) return;
      const T d = logprob - was, ratio = exp_of(d);
      sums[kDiscoTokens] += 1;
      sums[kDiscoScores] += static_cast<double>(p.rules.score == DiscoScore::ratio ? ratio : logprob);
      sums[kDiscoDivergences] +=
          static_cast<double>(p.rules.divergence == DiscoDivergence::k3 ? divergence_k3(d, ratio) : -d);
    });
    block_sums(sums, shared);
    if (threadIdx.x < kDiscoSums) {
      const double tokens = shared.totals[kDiscoTokens];
      double sum = shared.totals[threadIdx.x];
      if (threadIdx.x == kDiscoScores) sum = tokens > 0 ? sum / tokens : 0;
      p.sums[sequence * kDiscoSums + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

// A sequence among its group: one without tokens, or whose reward is neither one nor zero, has no class.
enum DiscoClass : int { kNegative, kPositive, kNeither };

struct DiscoSequence {
  int64_t group;
  double score, logit;
  int kind;
};

template <class T>
__device__ __forceinline__ DiscoSequence disco_sequence(const DiscoParams& p, int64_t sequence) {
  const double* sums = p.sums + sequence * kDiscoSums;
  const T reward = static_cast<const T*>(p.rewards)[sequence];
  DiscoSequence result;
  result.group = p.group_ids[sequence];
  result.score = sums[kDiscoScores];
  result.kind = sums[kDiscoTokens] == 0 ? kNeither : reward == 1 ? kPositive : reward == 0 ? kNegative : kNeither;
  result.logit = 0;
  if (result.kind == kPositive && p.rules.positives == DiscoPositives::length) {
    result.logit = (1 - sums[kDiscoTokens] / p.rules.max_length) / p.rules.length_temperature;
  }
  if (result.kind == kNegative && p.rules.negatives == DiscoNegatives::dro) result.logit = result.score / p.rules.tau;
  return result;
}

struct DiscoShared {
  DiscoSequence tile[kSequenceThreads];
  BlockSums<kDiscoTotals> totals;
  bool last;
};

// Calls `visit(index, sequence)` for all sequences, in their order. All threads of the block must call.
template <class T, class Visit>
__device__ __forceinline__ void for_sequences(const DiscoParams& p, DiscoShared& shared, Visit visit) {
  for (int64_t first = 0; first < p.batch.sequences; first += kSequenceThreads) {
    __syncthreads();
    if (first + threadIdx.x < p.batch.sequences) shared.tile[threadIdx.x] = disco_sequence<T>(p, first + threadIdx.x);
    __syncthreads();
    const int64_t rest = p.batch.sequences - first, count = rest < kSequenceThreads ? rest : kSequenceThreads;
    for (int index = 0; index < count; ++index) visit(first + index, shared.tile[index]);
  }
}

// What the groups' values and the divergence add up to.
template <class T>
__device__ __forceinline__ void finish_disco(const DiscoParams& p, const double* totals) {
  const auto over = [](double sum, double count) { return count > 0 ? sum / count : 0; };
  const double kl = over(totals[kTotalDivergence], totals[kTotalTokens]), excess = kl - p.rules.delta;
  const double slope = excess > 0 ? p.rules.beta * excess : excess > 0 || excess <= 0 ? 0 : excess;
  const double policy = -over(totals[kTotalValue], totals[kTotalGroups]);
  const double penalty = p.rules.published ? slope * kl : slope * excess / 2;
  p.factors[0] = -over(1, totals[kTotalGroups]);
  p.factors[1] = over(slope, totals[kTotalTokens]);
  const double values[kDiscoMetrics] = {policy, penalty, kl, excess > 0 ? 1.0 : 0.0, totals[kTotalGroups],
                                        totals[kTotalMixed], over(totals[kTotalPositiveScore], totals[kTotalPositives]),
                                        over(totals[kTotalNegativeScore], totals[kTotalNegatives])};
  for (int metric = 0; metric < kDiscoMetrics; ++metric) {
    static_cast<T*>(p.metrics)[metric] = static_cast<T>(values[metric]);
  }
  *static_cast<T*>(p.loss) = static_cast<T>(policy + penalty);
}

template <class T>
__global__ void __launch_bounds__(kSequenceThreads) disco_groups_kernel(DiscoParams p) {
  PYKERN_SHARED(DiscoShared, shared);
  const int64_t mine = int64_t{blockIdx.x} * kSequenceThreads + threadIdx.x;
  const bool here = mine < p.batch.sequences;
  DiscoSequence self{0, 0, 0, kNeither};
  if (here) self = disco_sequence<T>(p, mine);
  // Its class: the largest logit, and whether others of the group, or of the class, come first.
  double largest = -HUGE_VAL;
  int64_t negatives = 0, positives = 0;
  bool first_of_group = here, first_of_class = here;
  for_sequences<T>(p, shared, [&](int64_t index, const DiscoSequence& other) {
    if (other.group != self.group) return;
    first_of_group = first_of_group && index >= mine;
    negatives += other.kind == kNegative;
    positives += other.kind == kPositive;
    if (other.kind != self.kind) return;
    first_of_class = first_of_class && index >= mine;
    largest = other.logit > largest || other.logit != other.logit ? other.logit : largest;
  });
  const bool mixed = here && negatives > 0 && positives > 0;
  double sum = 0;
  for_sequences<T>(p, shared, [&](int64_t, const DiscoSequence& other) {
    if (other.group == self.group && other.kind == self.kind) sum += exp(other.logit - largest);
  });
  double share = 0, value = 0;
  if (mixed && self.kind != kNeither) {
    share = exp(self.logit - largest) / sum;
    if (self.kind == kPositive) {
      value = share * self.score;
    } else {
      share = -share;
      if (p.rules.negatives == DiscoNegatives::mean) {
        value = share * self.score;
      } else if (first_of_class) {
        const double eps = sizeof(T) == 4 ? 1.1920928955078125e-7 : 2.220446049250313e-16;
        value = -p.rules.tau * (p.rules.published ? sum / (sum + eps)
                                                  : largest + log(sum / static_cast<double>(negatives)));
      }
    }
  }
  if (here) {
    p.shares[mine] = share;
    const double* sums = p.sums + mine * kDiscoSums;
    double* totals = p.totals + mine * kDiscoTotals;
    totals[kTotalTokens] = sums[kDiscoTokens];
    totals[kTotalDivergence] = sums[kDiscoDivergences];
    totals[kTotalValue] = value;
    totals[kTotalGroups] = first_of_group ? 1 : 0;
    totals[kTotalMixed] = first_of_group && mixed ? 1 : 0;
    totals[kTotalPositives] = self.kind == kPositive ? 1 : 0;
    totals[kTotalPositiveScore] = self.kind == kPositive ? self.score : 0;
    totals[kTotalNegatives] = self.kind == kNegative ? 1 : 0;
    totals[kTotalNegativeScore] = self.kind == kNegative ? self.score : 0;
  }
  if (!is_last_block(p.finished, shared.last)) return;
  double totals[kDiscoTotals] = {};
  for (int64_t sequence = threadIdx.x; sequence < p.batch.sequences; sequence += kSequenceThreads) {
#pragma unroll
    for (int total = 0; total < kDiscoTotals; ++total) {
      totals[total] += __ldcg(p.totals + sequence * kDiscoTotals + total);
    }
  }
  block_sums(totals, shared.totals);
  if (threadIdx.x == 0) finish_disco<T>(p, shared.totals.totals);
}

template <class T>
__global__ void __launch_bounds__(kSequenceThreads) disco_gradient_kernel(DiscoParams p) {
  const T* const logprobs = static_cast<const T*>(p.logprobs);
  const T* const old = static_cast<const T*>(p.old_logprobs);
  T* const coefficient = static_cast<T*>(p.coefficient);
  const T of_divergence = static_cast<T>(p.factors[1]);
  for (int64_t sequence = blockIdx.x; sequence < p.batch.sequences; sequence += gridDim.x) {
    const TokenRange range = sequence_range(p.batch, sequence);
    const double tokens = p.sums[sequence * kDiscoSums + kDiscoTokens];
    const T of_score = tokens > 0 ? static_cast<T>(p.factors[0] * p.shares[sequence] / tokens) : T(0);
    for_tokens(p.batch, range, logprobs, old, [&](int64_t token, bool unmasked, T logprob, T was) {
      const T d = logprob - was;
      T value = of_score * (p.rules.score == DiscoScore::ratio ? exp_of(d) : T(1));
      value += of_divergence * (p.rules.divergence == DiscoDivergence::k3 ? expm1_of(d) : T(-1));
      coefficient[token] = unmasked ? value : T(0);
    });
  }
}

}  // namespace pykern
