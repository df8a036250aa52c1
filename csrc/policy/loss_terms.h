// What a kernel of policy_loss does to the tokens that it holds at a time, a vector of float32 or a single double:
// reads and writes, the rules of LOSSES, the divergences. Include from *.simd.cpp files only.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/vector.h"
#include "policy/loss.h"

namespace pykern::PYKERN_SIMD {

// The exponential `result` of a number is a number: what it is multiplied by may be 0.
PYKERN_INLINE vfloat finite(vfloat result, vfloat argument) {
  const vfloat largest = broadcast(FLT_MAX);
  return (result > largest) & (argument <= largest) ? largest : result;
}
PYKERN_INLINE double finite(double result, double argument, double largest = DBL_MAX) {
  return result > largest && argument <= DBL_MAX ? largest : result;
}

template <class V>
struct Kind;

template <>
struct Kind<vfloat> {
  using Scalar = float;
  using Condition = vint;
  static constexpr int64_t kWidth = kLanes;
  static PYKERN_INLINE vfloat all(double value) { return broadcast(static_cast<float>(value)); }
  static PYKERN_INLINE vint everywhere() { return zero() == zero(); }
  static PYKERN_INLINE vfloat read(const float* source, int64_t count) {
    return count == kWidth ? load(source) : load_partial(source, count);
  }
  static PYKERN_INLINE void write(float* target, vfloat value, int64_t count) {
    if (count == kWidth) {
      store(target, value);
    } else {
      store_partial(target, value, count);
    }
  }
  // Lanes that hold an unmasked token.
  static PYKERN_INLINE vint valid(const uint8_t* mask, int64_t count) {
    if (count == kWidth) return mask ? widen_bytes(mask) != 0 : everywhere();
    uint8_t bytes[kLanes] = {};
    for (int64_t lane = 0; lane < count; ++lane) bytes[lane] = mask ? mask[lane] : 1;
    return widen_bytes(bytes) != 0;
  }
  // By hand, since the compiler takes such a conversion apart byte by byte.
  static PYKERN_INLINE vint widen_bytes(const uint8_t* bytes) {
#if defined(__AVX512F__)
    return (vint)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#elif defined(__AVX2__)
    return (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#else
    vint result;
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = bytes[lane];
    return result;
#endif
  }
  static PYKERN_INLINE vfloat exponential(vfloat value) { return PYKERN_SIMD::exp(value); }
  static PYKERN_INLINE vfloat logarithm(vfloat value) {
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = std::log(value[lane]);
    return value;
  }
  static PYKERN_INLINE double sum(vfloat value) { return sum_lanes(value); }
  // exp(-d) + d - 1 and its derivative 1 - exp(-d). Near zero both cancel, so a series takes over.
  static PYKERN_INLINE void k3(vfloat d, vfloat* value, vfloat* derivative) {
    const vfloat e = finite(exponential(-d), -d);
    const vfloat half = broadcast(0.5f);
    const vint near = (d < half) & (d > -half);
    vfloat p = broadcast(-1.0f / 362880);
    p = p * d + 1.0f / 40320;
    p = p * d - 1.0f / 5040;
    p = p * d + 1.0f / 720;
    p = p * d - 1.0f / 120;
    p = p * d + 1.0f / 24;
    p = p * d - 1.0f / 6;
    p = p * d + 0.5f;
    const vfloat series = p * d * d;
    *value = near ? series : e + (d - 1.0f);
    *derivative = near ? d - series : 1.0f - e;
  }
};

template <>
struct Kind<double> {
  using Scalar = double;
  using Condition = bool;
  static constexpr int64_t kWidth = 1;
  static PYKERN_INLINE double all(double value) { return value; }
  static PYKERN_INLINE bool everywhere() { return true; }
  static PYKERN_INLINE double read(const double* source, int64_t) { return *source; }
  static PYKERN_INLINE void write(double* target, double value, int64_t) { *target = value; }
  static PYKERN_INLINE bool valid(const uint8_t* mask, int64_t) { return !mask || *mask; }
  static PYKERN_INLINE double exponential(double value) { return ::exp(value); }
  static PYKERN_INLINE double logarithm(double value) { return ::log(value); }
  static PYKERN_INLINE double sum(double value) { return value; }
  static PYKERN_INLINE void k3(double d, double* value, double* derivative) {
    const double less_one = finite(::expm1(-d), -d);
    *value = less_one + d;
    *derivative = -less_one;
  }
};

// A NaN stays NaN in both.
template <class V>
PYKERN_INLINE V clamp(V value, V low, V high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// The numbers of the parameters as a vector each, so that no store makes the compiler read them again.
template <class V>
struct LossConstants {
  using K = Kind<V>;
  explicit PYKERN_INLINE LossConstants(const PolicyLossParams& p)
      : rule(p.rule),
        stabilisation(p.stabilisation),
        weight_negative_only(p.weight_negative_only),
        ratio_limit(K::all(p.ratio_limit)),
        dual_clip(K::all(p.dual_clip)),
        negative_scale(K::all(p.negative_scale)),
        log_ratio_limit(K::all(p.log_ratio_limit)),
        kl_coef(K::all(p.kl_coef)),
        kl_log_ratio_limit(K::all(p.kl_log_ratio_limit)),
        kl_limit(K::all(p.kl_limit)),
        anchor_coef(K::all(p.anchor_coef)),
        rollout_low(K::all(p.rollout_low)),
        rollout_high(K::all(p.rollout_high)),
        stabilisation_low(K::all(p.stabilisation_low)),
        stabilisation_high(K::all(p.stabilisation_high)),
        shape{K::all(p.shape[0]), K::all(p.shape[1]), K::all(p.shape[2]), K::all(p.shape[3])} {}

  LossRule rule;
  Stabilisation stabilisation;
  bool weight_negative_only;
  V ratio_limit, dual_clip, negative_scale, log_ratio_limit, kl_coef, kl_log_ratio_limit, kl_limit, anchor_coef;
  V rollout_low, rollout_high, stabilisation_low, stabilisation_high;
  V shape[4];
};

// A token's loss, its derivatives by the log of the ratio and by the log-probability itself.
template <class V>
struct LossTerm {
  using Condition = typename Kind<V>::Condition;
  V loss, by_ratio, by_logprob;
  Condition clipped, dual;
};

// Ratios as the rules see them; `log_ratio` is what the ratio is the exponential of.
template <class V>
struct TokenRatio {
  V ratio, log_ratio, low, high;
};

template <bool kLimited, class V>
PYKERN_INLINE LossTerm<V> clip_term(const LossConstants<V>& p, const TokenRatio<V>& r, V advantage) {
  using K = Kind<V>;
  const V nothing = K::all(0), bounded = clamp(r.ratio, r.low, r.high), held = -advantage * bounded;
  LossTerm<V> term;
  if constexpr (kLimited) {
    const auto beyond = r.ratio > p.ratio_limit;
    const V free = -advantage * (beyond ? p.ratio_limit : r.ratio);
    term.clipped = held > free;
    term.loss = term.clipped ? held : free;
    // Within its own bounds the held branch still moves with the ratio: where ratio_limit is the tighter one.
    term.by_ratio = (term.clipped ? r.ratio != bounded : beyond) ? nothing : term.loss;
  } else {
    const V free = -advantage * r.ratio;
    term.clipped = held > free;
    term.loss = term.clipped ? held : free;
    term.by_ratio = term.clipped ? nothing : free;
  }
  const V floor = -advantage * p.dual_clip;
  term.dual = (advantage < nothing) & (term.loss > floor);
  term.loss = term.dual ? floor : term.loss;
  term.by_ratio = term.dual ? nothing : term.by_ratio;
  term.by_logprob = nothing;
  return term;
}

template <class V>
PYKERN_INLINE LossTerm<V> loss_term(const LossConstants<V>& p, const TokenRatio<V>& r, V logprob, V advantage) {
  using K = Kind<V>;
  const V nothing = K::all(0), one = K::all(1);
  advantage = advantage < nothing ? advantage * p.negative_scale : advantage;
  if (p.rule == LossRule::clip) return clip_term<true>(p, r, advantage);
  LossTerm<V> term{nothing, nothing, nothing, !K::everywhere(), !K::everywhere()};
  if (p.rule == LossRule::gate) {
    const V temperature = advantage > nothing ? p.shape[0] : p.shape[1];
    const V gate = one / (one + K::exponential(-(temperature * (r.ratio - one))));
    term.loss = -advantage * K::all(4) / temperature * gate;
    term.by_ratio = -advantage * K::all(4) * gate * (one - gate) * r.ratio;
    return term;
  }
  V weight = one;
  if (p.rule == LossRule::weight) {
    weight = clamp(r.ratio, r.low, r.high);
    term.clipped = r.ratio != weight;
    if (p.weight_negative_only) {
      const auto negative = advantage < nothing;
      weight = negative ? weight : one;
      term.clipped &= negative;
    }
  } else if (p.rule == LossRule::taper) {
    const auto negative = advantage < nothing;
    const V power = negative ? p.shape[2] : p.shape[0];
    const V rate = negative ? p.shape[3] : p.shape[1];
    weight = K::exponential(rate + power * r.log_ratio - rate * r.ratio);
  }
  term.by_logprob = -weight * advantage;
  term.loss = term.by_logprob * logprob;
  return term;
}

// Whether a token's probability is near enough to the old one to count.
template <class V>
PYKERN_INLINE typename Kind<V>::Condition is_stable(const LossConstants<V>& p, V logprob, V old, V advantage) {
  using K = Kind<V>;
  const V low = p.stabilisation_low, high = p.stabilisation_high, one = K::all(1);
  const V probability = K::exponential(logprob), before = K::exponential(old);
  const auto positive = advantage > K::all(0);
  if (p.stabilisation == Stabilisation::total_variation) {
    const V change = probability - before;
    return positive ? change <= high : change >= -low;
  }
  // The small term keeps a probability of one from a division by zero, as published.
  const V small = K::all(1e-8);
  const V divergence = before * (old - logprob) +
                       (one - before) * K::logarithm((one - before + small) / (one - probability + small));
  return positive ? (divergence <= high) | (probability <= before) : (divergence <= low) | (probability >= before);
}

// An estimate of the KL divergence and its derivative; the limits are k3's.
template <class V>
PYKERN_INLINE void divergence(KlEstimator kind, V raw, V limit, V highest, V* value, V* derivative) {
  using K = Kind<V>;
  const V nothing = K::all(0), one = K::all(1);
  if (kind == KlEstimator::k1) {
    *value = raw;
    *derivative = one;
  } else if (kind == KlEstimator::k2) {
    *value = raw * raw * K::all(0.5);
    *derivative = raw;
  } else if (kind == KlEstimator::absolute) {
    *value = raw < nothing ? -raw : raw;
    *derivative = raw > nothing ? one : raw < nothing ? -one : raw;
  } else {
    K::k3(clamp(raw, -limit, limit), value, derivative);
    const auto held = (raw < -limit) | (raw > limit) | (*value > highest);
    *derivative = held ? nothing : *derivative;
    *value = *value > highest ? highest : *value;
  }
}

}  // namespace pykern::PYKERN_SIMD
