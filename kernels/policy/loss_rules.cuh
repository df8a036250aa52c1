// What each rule makes of a ratio and an advantage: the loss of four tokens, and its slope.
#pragma once

#include "kernels/policy/loss_tokens.cuh"

namespace pykern {

// A ratio counts by its value or, in a constant weight beside the log-probability, not at all.
__host__ __device__ __forceinline__ bool moves_with_ratio(LossRule rule) {
  return rule == LossRule::clip || rule == LossRule::gate;
}

template <class T>
struct TokenRatios {
  FourTokens<T> value, logarithm;
  FourTokens<T> lower, upper;  // its bounds
};

template <class T>
struct RuleTerms {
  FourTokens<T> loss;
  FourTokens<T> slope;  // by the logarithm of the ratio where the rule moves with it, by the log-probability elsewhere
  TokenBits clipped, dual;
};

// The larger of the free and the clipped loss; below a negative advantage's, the dual clip. A NaN passes all.
template <class T>
__device__ __forceinline__ void clip_rule(const LossBounds<T>& bounds, const TokenRatios<T>& ratios,
                                          const FourTokens<T>& advantage, RuleTerms<T>& terms) {
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) {
    const T ratio = ratios.value[i], gain = advantage[i];
    const T limited = ratio > bounds.ratio_limit ? bounds.ratio_limit : ratio;
    const T free = -gain * limited, held = -gain * clamp(ratio, ratios.lower[i], ratios.upper[i]);
    const bool clipped = held > free, negative = gain < 0;
    const bool stopped =
        clipped ? ratio < ratios.lower[i] || ratio > ratios.upper[i] : ratio > bounds.ratio_limit;
    const T loss = clipped ? held : free, highest = -gain * bounds.dual_clip;
    const bool dual = negative && loss > highest;
    terms.loss[i] = dual ? highest : loss;
    terms.slope[i] = dual || stopped ? T(0) : -gain * ratio;
    terms.clipped |= (clipped ? 1u : 0u) << i;
    terms.dual |= (dual ? 1u : 0u) << i;
  }
}

// 4 / temper * sigmoid(temper (ratio - 1)), its slope 4 s (1 - s) from the smaller of the two exponentials.
template <class T>
__device__ __forceinline__ void gate_rule(const LossBounds<T>& bounds, const TokenRatios<T>& ratios,
                                          const FourTokens<T>& advantage, RuleTerms<T>& terms) {
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) {
    const T temper = advantage[i] > 0 ? bounds.shape[0] : bounds.shape[1];
    const T distance = temper * (ratios.value[i] - 1);
    const bool below = distance < 0;
    const T small = exponential(below ? distance : -distance), share = 1 / (1 + small);
    terms.loss[i] = -advantage[i] * (4 / temper) * (below ? small * share : share);
    terms.slope[i] = -advantage[i] * 4 * (small * share) * share * ratios.value[i];
  }
}

// -weight advantage logprob with a constant weight: of the clipped ratio, of its taper, or one.
template <class T>
__device__ __forceinline__ void weight_rules(LossRule rule, bool negative_only, const LossBounds<T>& bounds,
                                             const TokenRatios<T>& ratios, const FourTokens<T>& logprob,
                                             const FourTokens<T>& advantage, RuleTerms<T>& terms) {
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) terms.slope[i] = -advantage[i];
  if (rule == LossRule::weight) {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      const T ratio = ratios.value[i], bounded = clamp(ratio, ratios.lower[i], ratios.upper[i]);
      const bool weighs = !negative_only || advantage[i] < 0, clipped = bounded < ratio || bounded > ratio;
      terms.clipped |= (weighs && clipped ? 1u : 0u) << i;
      terms.slope[i] *= weighs ? bounded : T(1);
    }
  } else if (rule == LossRule::taper) {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      const bool negative = advantage[i] < 0;
      const T power = negative ? bounds.shape[2] : bounds.shape[0], rate = negative ? bounds.shape[3] : bounds.shape[1];
      terms.slope[i] *= exponential(rate + power * ratios.logarithm[i] - rate * ratios.value[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) terms.loss[i] = terms.slope[i] * logprob[i];
}

template <class T>
__device__ __forceinline__ RuleTerms<T> rule_terms(const LossParams& p, const LossBounds<T>& bounds,
                                                   const TokenRatios<T>& ratios, const FourTokens<T>& logprob,
                                                   FourTokens<T> advantage) {
  RuleTerms<T> terms{};
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) {
    advantage[i] = advantage[i] < 0 ? advantage[i] * bounds.negative_scale : advantage[i];
  }
  if (p.rule == LossRule::clip) {
    clip_rule(bounds, ratios, advantage, terms);
  } else if (p.rule == LossRule::gate) {
    gate_rule(bounds, ratios, advantage, terms);
  } else {
    weight_rules(p.rule, p.weight_negative_only, bounds, ratios, logprob, advantage, terms);
  }
  return terms;
}

// --- stabilisation --------------------------------------------------------------------------------------------------

__device__ __forceinline__ float less_one(float value) { return expm1f(value); }
__device__ __forceinline__ double less_one(double value) { return expm1(value); }
__device__ __forceinline__ float logarithm(float value) { return logf(value); }
__device__ __forceinline__ double logarithm(double value) { return log(value); }

// Whether a token stays in the loss: its probability has not moved too far in the direction of its advantage.
template <class T>
__device__ __forceinline__ bool stays(LossStabilisation kind, const LossBounds<T>& bounds, T logprob, T old,
                                      T advantage) {
  const T now = exponential(logprob), before = exponential(old);
  const bool rises = advantage > 0;
  if (kind == LossStabilisation::total_variation) {
    return rises ? now - before <= bounds.stabilisation_high : now - before >= -bounds.stabilisation_low;
  }
  const T tiny = T(1e-8), others_now = -less_one(logprob), others_before = -less_one(old);
  const T moved =
      before * (old - logprob) + others_before * logarithm((others_before + tiny) / (others_now + tiny));
  return rises ? moved <= bounds.stabilisation_high || now <= before
               : moved <= bounds.stabilisation_low || now >= before;
}

}  // namespace pykern
