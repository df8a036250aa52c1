// Ratios of whole sequences beside parts that loss_sm80.cuh does not know: a pass before that over the tokens adds up
// the logarithm of the ratio, and one after it brings the ratio's gradient to each of its tokens.
#pragma once

#include "kernels/policy/loss_count_sm80.cuh"
#include "kernels/policy/loss_rules.cuh"
#include "kernels/policy/loss_totals.cuh"

namespace pykern {

// Of each sequence, or of each token.
template <class T>
__device__ __forceinline__ FourTokens<T> read_values(const PartPacks& packs, const LossValues& values,
                                                     int64_t sequence, uint32_t pack, TokenBits wanted) {
  if (values.per_token) return packs.template read<T>(values.values, pack, wanted);
  FourTokens<T> result{};
  if (values.values) {
    const T same = static_cast<const T*>(values.values)[sequence];
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) result[i] = same;
  }
  return result;
}

// Where clips begin: for ratios, or for log-ratios if those are clipped before their mean.
template <bool per_token, class T>
__device__ __forceinline__ void read_clips(const LossParams& p, const LossBounds<T>& bounds, const PartPacks& packs,
                                           uint32_t pack, TokenBits wanted, FourTokens<T>& lower,
                                           FourTokens<T>& upper) {
  const T middle = p.ratio == LossRatio::clipped_sequence ? T(0) : T(1);
  const bool has_low = per_token && p.clip_low, has_high = per_token && p.clip_high;
  if (has_low) lower = packs.template read<T>(p.clip_low, pack, wanted);
  if (has_high) upper = packs.template read<T>(p.clip_high, pack, wanted);
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) {
    lower[i] = has_low ? middle - lower[i] : bounds.ratio_low;
    upper[i] = has_high ? middle + upper[i] : bounds.ratio_high;
  }
}

// What a token adds to the logarithm of its sequence's ratio. Beyond a limit its log-probability does not move it.
template <class T>
struct RatioTerm {
  T log_ratio;
  bool moving;
};

template <class T>
__device__ __forceinline__ RatioTerm<T> ratio_term(const LossParams& p, const LossBounds<T>& bounds, T distance,
                                                   T advantage, T lower, T upper) {
  if (p.ratio == LossRatio::sequence) return {distance, true};
  if (p.ratio == LossRatio::product) {
    const T limit = bounds.log_ratio_limit;
    return {clamp(distance, -limit, limit), !(distance < -limit || distance > limit)};
  }
  // Clipped where that lowers the advantage's gain.
  const T bounded = clamp(distance, lower, upper);
  const bool clipped = advantage < 0 ? bounded > distance : bounded < distance;
  return {clipped ? bounded : distance, !clipped};
}

// The taper of a product of ratios is that against the rollout.
__device__ __forceinline__ bool starts_at_rollout(const LossParams& p) {
  return p.rollout_logprobs && p.rule == LossRule::taper && p.ratio == LossRatio::product;
}

// The first sums of a sequence, from those of its parts in a fixed order. All lanes must call.
template <int count>
__device__ __forceinline__ void sequence_sums(const LossParams& p, int64_t sequence, double (&sums)[count]) {
  const double* of_parts = p.part_sums + sequence * p.grid.parts * kComposedSums;
#pragma unroll
  for (int i = 0; i < count; ++i) sums[i] = 0;
  for (int64_t part = threadIdx.x % kWarpSize; part < p.grid.parts; part += kWarpSize) {
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] += of_parts[part * kComposedSums + i];
  }
#pragma unroll
  for (int i = 0; i < count; ++i) sums[i] = warp_reduce(sums[i], Sum{});
}

// The ratio of a sequence from its sums.
struct SequenceRatio {
  double logarithm, advantage;
  double step;  // of the logarithm by one of a moving token

  __device__ __forceinline__ SequenceRatio(const LossParams& p, const double* sums, double length) {
    const double one = length > 0 ? 1 / length : 0;
    const bool product = p.ratio == LossRatio::product, limited = p.ratio != LossRatio::clipped_sequence;
    const double raw = product ? sums[kTokenLogRatios] : sums[kTokenLogRatios] * one;
    const double low = limited ? p.bounds.sequence_log_ratio_low : -HUGE_VAL;
    const double high = limited ? p.bounds.sequence_log_ratio_high : HUGE_VAL;
    logarithm = clamp(raw, low, high);
    advantage = sums[kAdvantages] * one;
    step = raw < low || raw > high ? 0 : product ? 1 : one;
  }
};

// Whether the loss has a gradient by the ratio itself.
__host__ __device__ __forceinline__ bool moves_ratio(const LossParams& p) {
  const bool weighs_divergence = p.kl != KlDivergence::none && p.kl_gradient == KlGradient::importance;
  return moves_with_ratio(p.rule) || (weighs_divergence && p.ratio != LossRatio::product);
}

// --- before the pass over the tokens --------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kLossThreads) ratio_sums_kernel(LossArguments<T> arguments) {
  PYKERN_SHARED(BlockTotals<kComposedSums>, shared);
  const LossParams& p = arguments.params;
  const LossBounds<T>& bounds = arguments.bounds;
  const bool clipped = p.ratio == LossRatio::clipped_sequence;
  TokenCounter counter(p);
  for (int64_t item = blockIdx.x; item < p.sequences * p.grid.parts; item += gridDim.x) {
    const LossPart part = find_part(p, item);
    const PartPacks packs(p, part, arguments.packs);
    double sums[kComposedSums] = {};
    unsigned unmasked = 0;
    // All threads take part in all turns, for the words of bits.
    for (uint32_t turn = 0; turn < packs.end(); turn += kLossThreads) {
      const uint32_t pack = turn + threadIdx.x;
      const TokenBits valid = p.mask ? keep_mask(p, part, packs, pack) : packs.inside(pack);
      unmasked += __popc(valid & kFourTokens);
      const FourTokens<T> logprob = packs.template read<T>(p.logprobs, pack, valid);
      const FourTokens<T> old = packs.template read<T>(p.old_logprobs, pack, valid);
      FourTokens<T> advantage{}, lower{}, upper{}, rollout{};
      if (clipped) {
        advantage = read_values<T>(packs, p.advantages, part.sequence, pack, valid);
        read_clips<true>(p, bounds, packs, pack, valid, lower, upper);
      }
      if (starts_at_rollout(p)) rollout = packs.template read<T>(p.rollout_logprobs, pack, valid);
      T log_ratios = 0, advantages = 0;
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        if (!is_wanted(valid, i)) continue;
        log_ratios += ratio_term(p, bounds, logprob[i] - old[i], advantage[i], lower[i], upper[i]).log_ratio;
        if (starts_at_rollout(p)) {
          log_ratios += clamp(old[i] - rollout[i], -bounds.log_ratio_limit, bounds.log_ratio_limit);
        }
        advantages += advantage[i];
      }
      sums[kTokenLogRatios] += static_cast<double>(log_ratios);
      sums[kAdvantages] += static_cast<double>(advantages);
    }
    counter.add(part.sequence, unmasked);
    block_totals(sums, shared, [&](int index, double sum) { p.part_sums[item * kComposedSums + index] = sum; });
  }
  counter.finish();
}

// --- after it -------------------------------------------------------------------------------------------------------

// Adds to the coefficient of each token what the loss changes with the ratio of its sequence.
template <class T>
__global__ void __launch_bounds__(kLossThreads) ratio_gradient_kernel(LossArguments<T> arguments) {
  const LossParams& p = arguments.params;
  const LossBounds<T>& bounds = arguments.bounds;
  const LossShares<T> shares(arguments);
  const bool clipped = p.ratio == LossRatio::clipped_sequence;
  const bool all_move =
      p.ratio == LossRatio::sequence || (p.ratio == LossRatio::product && !(p.bounds.log_ratio_limit < HUGE_VAL));
  for (int64_t item = blockIdx.x; item < p.sequences * p.grid.parts; item += gridDim.x) {
    const LossPart part = find_part(p, item);
    double sums[kComposedSums];
    sequence_sums(p, part.sequence, sums);
    const SequenceRatio ratio(p, sums, shares.length_of(part.sequence));
    const T share = static_cast<T>(ratio.step > 0 ? sums[kChain] * ratio.step : 0);
    const PartPacks packs(p, part, arguments.packs);
    for (uint32_t pack = threadIdx.x; pack < packs.end(); pack += kLossThreads) {
      const TokenBits valid = packs.unmasked(pack);
      if (!(valid & kFourTokens)) continue;
      // A masked token's is zero, and stays so.
      FourTokens<T> coefficient = packs.template read<T>(p.coefficient, pack, packs.inside(pack));
      FourTokens<T> logprob{}, old{}, advantage{}, lower{}, upper{};
      if (!all_move) {
        logprob = packs.template read<T>(p.logprobs, pack, valid);
        old = packs.template read<T>(p.old_logprobs, pack, valid);
      }
      if (clipped) {
        advantage = read_values<T>(packs, p.advantages, part.sequence, pack, valid);
        read_clips<true>(p, bounds, packs, pack, valid, lower, upper);
      }
#pragma unroll
      for (int i = 0; i < kThreadTokens; ++i) {
        const bool moving =
            all_move || ratio_term(p, bounds, logprob[i] - old[i], advantage[i], lower[i], upper[i]).moving;
        if (is_wanted(valid, i) && moving) coefficient[i] += share;
      }
      packs.write(p.coefficient, pack, coefficient);
    }
  }
}

}  // namespace pykern
