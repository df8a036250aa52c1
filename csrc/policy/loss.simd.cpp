// One pass over the tokens of a segment: loss, its gradients with respect to log-probability and entropy, and the
// sums behind the metrics. Written once for a vector of float32 and for a single double.
#include "policy/loss.h"

#include <cmath>
#include <limits>

#include "common/vector.h"
#include "policy/loss_terms.h"

namespace pykern::PYKERN_SIMD {
namespace {

// Sums of this many tokens stay in float32 lanes before they are added in double.
constexpr int64_t kBlock = 1024;

// `kParts` leaves out what params.parts rules out.
template <class V, LossParts kParts>
class Segment {
  static constexpr bool kPlain = kParts == LossParts::plain;
  static constexpr bool kAll = kParts == LossParts::all;
  using K = Kind<V>;
  using Scalar = typename K::Scalar;
  using Condition = typename K::Condition;

 public:
  Segment(const PolicyLossParams& params, int64_t index)
      : p_(params), segment_(params.segments[index]), sums_(params.sums + index * kLossSums) {}

  void run() {
    for (int sum = 0; sum < kLossSums; ++sum) sums_[sum] = 0;
    if constexpr (!kPlain) {
      if (!by_token()) find_sequence_ratio();
    }
    for (int64_t begin = segment_.begin; begin < segment_.end; begin += kBlock) {
      run_block(begin, begin + kBlock < segment_.end ? begin + kBlock : segment_.end);
    }
    if (!p_.token_weights) {
      sums_[kWeightedKl] = sums_[kKlSum];
      sums_[kWeightedAnchor] = sums_[kAnchorSum];
      sums_[kWeightedEntropy] = sums_[kEntropySum];
    }
    if constexpr (!kPlain) {
      if (!by_token() && p_.coefficient) spread_gradient();
    }
  }

 private:
  bool by_token() const { return kPlain || p_.ratio == RatioLevel::token; }
  bool clips_log_ratios() const { return p_.ratio == RatioLevel::clipped_sequence; }
  // A taper's product takes the rollout ratio in, rather than be weighted by it.
  bool folds_rollout() const {
    return p_.rollout_logprobs && p_.rule == LossRule::taper && p_.ratio == RatioLevel::product;
  }

  const Scalar* at(const void* array, int64_t token) const { return static_cast<const Scalar*>(array) + token; }
  int64_t lanes(int64_t token, int64_t end) const { return end - token < K::kWidth ? end - token : K::kWidth; }
  Condition valid(int64_t token, int64_t count) const {
    return K::valid(p_.mask ? p_.mask + token : nullptr, count);
  }
  V read(const void* array, int64_t token, int64_t count) const { return K::read(at(array, token), count); }
  V read(const LossValues& values, int64_t token, int64_t count) const {
    if (values.per_token) return read(values.data, token, count);
    return K::all(static_cast<double>(*at(values.data, segment_.sequence)));
  }

  // The log-ratio of a clipped sequence's token: where its clip is in force, and its value with it.
  Condition clip_log_ratio(int64_t token, int64_t count, V raw, V* value) const {
    const V low = p_.clip_low ? -read(p_.clip_low, token, count) : K::all(p_.ratio_low);
    const V high = p_.clip_high ? read(p_.clip_high, token, count) : K::all(p_.ratio_high);
    const V bounded = clamp(raw, low, high);
    const Condition negative = read(p_.advantages, token, count) < K::all(0);
    const Condition clipped = negative ? bounded > raw : bounded < raw;
    *value = clipped ? bounded : raw;
    return clipped;
  }

  // Of the whole sequence, from the mean or the sum of its log-ratios.
  void find_sequence_ratio() {
    const V limit = K::all(p_.log_ratio_limit);
    const bool product = p_.ratio == RatioLevel::product, folds = folds_rollout(), clips = clips_log_ratios();
    const bool averages = clips && p_.advantages.per_token;
    double total = 0, advantages = 0;
    for (int64_t begin = segment_.begin; begin < segment_.end; begin += kBlock) {
      const int64_t end = begin + kBlock < segment_.end ? begin + kBlock : segment_.end;
      V sum = K::all(0), of_advantages = K::all(0);
      for (int64_t token = begin; token < end; token += K::kWidth) {
        const int64_t count = lanes(token, end);
        const Condition counts = valid(token, count);
        const V old = read(p_.old_logprobs, token, count);
        V distance = read(p_.logprobs, token, count) - old;
        if (product) distance = clamp(distance, -limit, limit);
        if (folds) distance += clamp(old - read(p_.rollout_logprobs, token, count), -limit, limit);
        if (clips) clip_log_ratio(token, count, distance, &distance);
        sum += counts ? distance : K::all(0);
        if (averages) of_advantages += counts ? read(p_.advantages, token, count) : K::all(0);
      }
      total += K::sum(sum);
      if (averages) advantages += K::sum(of_advantages);
    }
    const auto length = static_cast<double>(p_.lengths[segment_.sequence]);
    log_ratio_ = product || length == 0 ? total : total / length;
    if (averages && length > 0) mean_advantage_ = advantages / length;
    if (!clips) {
      const double low = p_.sequence_log_ratio_low, high = p_.sequence_log_ratio_high;
      limited_ = log_ratio_ < low || log_ratio_ > high;
      if (limited_) log_ratio_ = log_ratio_ < low ? low : high;
    }
    ratio_ = finite(::exp(log_ratio_), log_ratio_, std::numeric_limits<Scalar>::max());
  }

  void run_block(int64_t begin, int64_t end) {
    const V nothing = K::all(0), one = K::all(1);
    const LossConstants<V> c(p_);
    const V limit = c.log_ratio_limit, infinite = K::all(INFINITY);
    const V weight = K::all(p_.sequence_weight[segment_.sequence]);
    const bool by_token = this->by_token(), clips_logs = !by_token && clips_log_ratios();
    const bool averaged = clips_logs && p_.advantages.per_token;
    const bool weighs = p_.rollout_logprobs && (kPlain || !folds_rollout());
    TokenRatio<V> r{K::all(ratio_), K::all(log_ratio_), K::all(p_.ratio_low), K::all(p_.ratio_high)};
    if (clips_logs) {
      r.low = -infinite;
      r.high = infinite;
    }
    V sums[kLossSums];
    // Unrolled, or the sums would stay in memory.
#pragma GCC unroll 16
    for (int sum = 0; sum < kLossSums; ++sum) sums[sum] = nothing;
    V chain = nothing;
    for (int64_t token = begin; token < end; token += K::kWidth) {
      const int64_t count = lanes(token, end);
      const Condition counts = valid(token, count);
      const V logprob = read(p_.logprobs, token, count), old = read(p_.old_logprobs, token, count);
      const V advantage = read(p_.advantages, token, count);
      const V raw = logprob - old;
      if (kAll && !clips_logs) {
        if (p_.clip_low) r.low = one - read(p_.clip_low, token, count);
        if (p_.clip_high) r.high = one + read(p_.clip_high, token, count);
      }
      Condition outside = !K::everywhere(), log_clipped = !K::everywhere();
      if (by_token) {
        // The ratio's own clamp has no gradient beyond its limit.
        outside = (raw < -limit) | (raw > limit);
        r.log_ratio = clamp(raw, -limit, limit);
        r.ratio = finite(K::exponential(r.log_ratio), r.log_ratio);
      } else if constexpr (!kPlain) {
        V unused;
        if (clips_logs) log_clipped = clip_log_ratio(token, count, raw, &unused);
      }

      LossTerm<V> term;
      if constexpr (kPlain) {
        term = clip_term<false>(c, r, advantage);
      } else {
        term = loss_term<V>(c, r, logprob, averaged ? K::all(mean_advantage_) : advantage);
        if (kAll && p_.second_advantages.data) {
          const LossTerm<V> other = loss_term<V>(c, r, logprob, read(p_.second_advantages, token, count));
          const V share = read(p_.advantage_weights, token, count);
          term.loss = share * term.loss + (one - share) * other.loss;
          term.by_ratio = share * term.by_ratio + (one - share) * other.by_ratio;
          term.by_logprob = share * term.by_logprob + (one - share) * other.by_logprob;
        }
      }
      V rollout = nothing;
      if (weighs) {
        rollout = K::exponential(old - read(p_.rollout_logprobs, token, count));
        const V truncated = clamp(rollout, c.rollout_low, c.rollout_high);
        // A NaN is in no range, and stays.
        const Condition excluded = (rollout < c.rollout_low) | (rollout > c.rollout_high);
        rollout = p_.rollout_mask ? (excluded ? nothing : rollout) : truncated;
        scale(term, rollout);
      }
      V share = one;
      if constexpr (kAll) {
        if (p_.rollout_weights.data) {
          rollout = read(p_.rollout_weights, token, count);
          scale(term, rollout);
        }
        Condition kept = K::everywhere();
        if (p_.keep) kept = K::valid(p_.keep + token, count);
        if (p_.stabilisation != Stabilisation::none) {
          kept &= is_stable<V>(c, logprob, old, averaged ? K::all(mean_advantage_) : advantage);
        }
        term.loss = kept ? term.loss : nothing;
        term.by_ratio = kept ? term.by_ratio : nothing;
        term.by_logprob = kept ? term.by_logprob : nothing;
        sums[kKept] += (counts & kept) ? one : nothing;
        if (p_.token_weights) share = read(p_.token_weights, token, count);
      }
      if (weighs || (kAll && p_.rollout_weights.data)) {
        sums[kRolloutWeightSum] += counts ? rollout : nothing;
      }
      const Condition clipped = term.clipped | log_clipped;
      const Condition below = clips_logs ? raw < nothing : r.ratio < r.low;
      sums[kPolicySum] += counts ? weighted(term.loss, share) : nothing;
      sums[kRatioSum] += counts ? r.ratio : nothing;
      sums[kLogRatioSum] += counts ? (by_token ? r.log_ratio : raw) : nothing;
      sums[kClippedLow] += (counts & clipped & below) ? one : nothing;
      sums[kClippedHigh] += (counts & clipped & !below) ? one : nothing;
      sums[kDualClipped] += (counts & term.dual) ? one : nothing;

      if (p_.kl != KlEstimator::none) {
        V value, derivative;
        const V distance = logprob - read(p_.ref_logprobs, token, count);
        divergence<V>(p_.kl, distance, c.kl_log_ratio_limit, c.kl_limit, &value, &derivative);
        if constexpr (kAll) {
          if (p_.kl_gradient == KlGradient::straight_through) derivative = distance;
          if (p_.kl_gradient == KlGradient::importance && p_.ratio == RatioLevel::product) {
            // A product over the sequence is no weight for a token's estimate: that takes the token's ratio.
            const V bounded = clamp(raw, -limit, limit), ratio = finite(K::exponential(bounded), bounded);
            value *= ratio;
            derivative = derivative * ratio + ((raw == bounded) | (raw != raw) ? value : nothing);
          } else if (p_.kl_gradient == KlGradient::importance) {
            value *= r.ratio;
            derivative *= r.ratio;
            term.by_ratio += c.kl_coef * value;
          }
        }
        term.by_logprob += c.kl_coef * derivative;
        sums[kKlSum] += counts ? value : nothing;
        if (kAll && p_.token_weights) sums[kWeightedKl] += counts ? share * value : nothing;
      }
      if constexpr (kAll) {
        if (p_.anchor != KlEstimator::none) {
          V value, derivative;
          divergence<V>(p_.anchor, logprob - read(p_.anchor_logprobs, token, count), infinite, infinite,
                        &value, &derivative);
          if (p_.anchor_keep) {
            const Condition kept = K::valid(p_.anchor_keep + token, count);
            value = kept ? value : nothing;
            derivative = kept ? derivative : nothing;
          }
          term.by_logprob += c.anchor_coef * derivative;
          sums[kAnchorSum] += counts ? value : nothing;
          if (p_.token_weights) sums[kWeightedAnchor] += counts ? share * value : nothing;
        }
        if (p_.entropy) {
          const V value = read(p_.entropy, token, count);
          sums[kEntropySum] += counts ? value : nothing;
          if (p_.token_weights) sums[kWeightedEntropy] += counts ? share * value : nothing;
          if (p_.entropy_coefficient) {
            K::write(static_cast<Scalar*>(p_.entropy_coefficient) + token,
                     counts ? weighted(K::all(-p_.entropy_coef) * weight, share) : nothing, count);
          }
        }
      }

      V gradient = term.by_logprob;
      term.by_ratio = outside ? nothing : term.by_ratio;
      if (by_token) {
        gradient += term.by_ratio;
      } else {
        chain += counts ? weighted(term.by_ratio, share) : nothing;
      }
      if (p_.coefficient) {
        K::write(static_cast<Scalar*>(p_.coefficient) + token,
                 counts ? weighted(weight * gradient, share) : nothing, count);
      }
    }
#pragma GCC unroll 16
    for (int sum = 0; sum < kLossSums; ++sum) sums_[sum] += K::sum(sums[sum]);
    if (!by_token) chain_ += K::sum(chain);
  }

  V weighted(V value, V share) const { return kAll && p_.token_weights ? share * value : value; }

  static void scale(LossTerm<V>& term, V factor) {
    term.loss *= factor;
    term.by_ratio *= factor;
    if constexpr (!kPlain) term.by_logprob *= factor;
  }

  // The ratio of a sequence depends on each token whose log-ratio is in it as it is.
  void spread_gradient() {
    const auto length = static_cast<double>(p_.lengths[segment_.sequence]);
    if (length == 0 || limited_) return;
    const double part = p_.ratio == RatioLevel::product ? chain_ : chain_ / length;
    const V nothing = K::all(0), share = K::all(part * p_.sequence_weight[segment_.sequence]);
    const V limit = K::all(p_.log_ratio_limit);
    const bool some = p_.ratio != RatioLevel::sequence, clips = clips_log_ratios();
    auto* coefficient = static_cast<Scalar*>(p_.coefficient);
    for (int64_t token = segment_.begin; token < segment_.end; token += K::kWidth) {
      const int64_t count = lanes(token, segment_.end);
      Condition counts = valid(token, count);
      if (some) {
        V raw = read(p_.logprobs, token, count) - read(p_.old_logprobs, token, count);
        counts &= !(clips ? clip_log_ratio(token, count, raw, &raw) : (raw < -limit) | (raw > limit));
      }
      const V before = K::read(coefficient + token, count);
      K::write(coefficient + token, before + (counts ? share : nothing), count);
    }
  }

  const PolicyLossParams& p_;
  const LossSegment segment_;
  double* sums_;
  double log_ratio_ = 0, ratio_ = 1, mean_advantage_ = 0, chain_ = 0;
  bool limited_ = false;
};

}  // namespace

int64_t count_unmasked(const uint8_t* mask, int64_t count) {
  int64_t total = 0;
  for (int64_t token = 0; token < count; ++token) total += mask[token] != 0;
  return total;
}

void policy_loss_f32(const PolicyLossParams& params, int64_t segment) {
  switch (params.parts) {
    case LossParts::plain: Segment<vfloat, LossParts::plain>(params, segment).run(); break;
    case LossParts::common: Segment<vfloat, LossParts::common>(params, segment).run(); break;
    case LossParts::all: Segment<vfloat, LossParts::all>(params, segment).run(); break;
  }
}

void policy_loss_f64(const PolicyLossParams& params, int64_t segment) {
  Segment<double, LossParts::all>(params, segment).run();
}

void scale_f32(const float* source, float factor, float* target, int64_t count) {
  for (int64_t token = 0; token < count; ++token) target[token] = source[token] * factor;
}

}  // namespace pykern::PYKERN_SIMD
