// One pass over the tokens of a segment: loss, its gradient with respect to the log-probability, and the sums
// behind the metrics. Written once for a vector of float32 and for a single double.
#include "policy/loss.h"

#include <cmath>

#include "common/vector.h"

namespace pykern::PYKERN_SIMD {
namespace {

// Sums of this many tokens stay in float32 lanes before they are added in double.
constexpr int64_t kBlock = 1024;

typedef uint8_t vbyte __attribute__((vector_size(kLanes)));

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
    if (!mask && count == kWidth) return everywhere();
    vbyte bytes = {};
    if (mask && count == kWidth) {
      std::memcpy(&bytes, mask, sizeof bytes);
    } else {
      for (int64_t lane = 0; lane < count; ++lane) bytes[lane] = mask ? mask[lane] : 1;
    }
    return __builtin_convertvector(bytes, vint) != 0;
  }
  static PYKERN_INLINE vfloat exponential(vfloat value) { return PYKERN_SIMD::exp(value); }
  static PYKERN_INLINE double sum(vfloat value) { return sum_lanes(value); }
  // exp(-d) + d - 1 and its derivative 1 - exp(-d). Near zero both cancel, so a series takes over.
  static PYKERN_INLINE void k3(vfloat d, vfloat* value, vfloat* derivative) {
    const vfloat e = exponential(-d);
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
  static PYKERN_INLINE double sum(double value) { return value; }
  static PYKERN_INLINE void k3(double d, double* value, double* derivative) {
    const double less_one = ::expm1(-d);
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

template <class V>
class Segment {
  using K = Kind<V>;
  using Scalar = typename K::Scalar;
  using Condition = typename K::Condition;

 public:
  Segment(const PolicyLossParams& params, int64_t index)
      : p_(params), segment_(params.segments[index]), sums_(params.sums + index * kLossSums) {}

  void run() {
    for (int sum = 0; sum < kLossSums; ++sum) sums_[sum] = 0;
    if (p_.sequence_ratio) find_sequence_ratio();
    for (int64_t begin = segment_.begin; begin < segment_.end; begin += kBlock) {
      run_block(begin, begin + kBlock < segment_.end ? begin + kBlock : segment_.end);
    }
    if (p_.sequence_ratio && p_.coefficient && !p_.weight_clip) spread_gradient();
  }

 private:
  const Scalar* at(const void* array, int64_t token) const { return static_cast<const Scalar*>(array) + token; }
  const uint8_t* mask_at(int64_t token) const { return p_.mask ? p_.mask + token : nullptr; }
  int64_t lanes(int64_t token, int64_t end) const { return end - token < K::kWidth ? end - token : K::kWidth; }

  // exp of the mean log-ratio of the whole sequence.
  void find_sequence_ratio() {
    double total = 0;
    for (int64_t begin = segment_.begin; begin < segment_.end; begin += kBlock) {
      const int64_t end = begin + kBlock < segment_.end ? begin + kBlock : segment_.end;
      V sum = K::all(0);
      for (int64_t token = begin; token < end; token += K::kWidth) {
        const int64_t count = lanes(token, end);
        const V distance = K::read(at(p_.logprobs, token), count) - K::read(at(p_.old_logprobs, token), count);
        sum += K::valid(mask_at(token), count) ? distance : K::all(0);
      }
      total += K::sum(sum);
    }
    const int64_t length = p_.lengths[segment_.sequence];
    mean_ = length > 0 ? total / static_cast<double>(length) : 0;
    limited_ = mean_ > p_.sequence_log_ratio_limit;
    ratio_ = ::exp(limited_ ? p_.sequence_log_ratio_limit : mean_);
  }

  void run_block(int64_t begin, int64_t end) {
    const V nothing = K::all(0), one = K::all(1);
    const V low = K::all(p_.ratio_low), high = K::all(p_.ratio_high), dual = K::all(p_.dual_clip);
    const V limit = K::all(p_.log_ratio_limit), kl_coef = K::all(p_.kl_coef);
    const V weight = K::all(p_.sequence_weight[segment_.sequence]);
    const V sequence_advantage =
        p_.per_token_advantages ? nothing : K::all(static_cast<double>(*at(p_.advantages, segment_.sequence)));
    V sums[kLossSums];
    for (V& sum : sums) sum = nothing;
    V chain = nothing;
    for (int64_t token = begin; token < end; token += K::kWidth) {
      const int64_t count = lanes(token, end);
      const Condition valid = K::valid(mask_at(token), count);
      const V logprob = K::read(at(p_.logprobs, token), count);
      const V advantage = p_.per_token_advantages ? K::read(at(p_.advantages, token), count) : sequence_advantage;
      const V raw = logprob - K::read(at(p_.old_logprobs, token), count);
      V log_ratio = raw, ratio;
      Condition outside = !K::everywhere();
      if (p_.sequence_ratio) {
        ratio = K::all(ratio_);
        if (limited_) outside = K::everywhere();
      } else {
        log_ratio = clamp(raw, -limit, limit);
        outside = raw != log_ratio;
        ratio = K::exponential(log_ratio);
      }

      // The ratio's own clamp has no gradient beyond its limit; a clipped weight never has one.
      const V bounded = clamp(ratio, low, high);
      V loss, slope;
      Condition clipped;
      if (p_.weight_clip) {
        loss = -bounded * advantage * logprob;
        slope = -bounded * advantage;
        clipped = ratio != bounded;
      } else {
        const V free = -advantage * ratio, held = -advantage * bounded;
        clipped = held > free;
        loss = clipped ? held : free;
        slope = clipped ? nothing : free;
        slope = outside & (raw == raw) ? nothing : slope;
        const V floor = -advantage * dual;
        const Condition below = (advantage < nothing) & (loss > floor);
        loss = below ? floor : loss;
        slope = below ? nothing : slope;
        sums[kDualClipped] += valid & below ? one : nothing;
      }
      if (p_.rollout_logprobs) {
        const V gap = K::read(at(p_.old_logprobs, token), count) - K::read(at(p_.rollout_logprobs, token), count);
        const V truncated = clamp(K::exponential(gap), nothing, K::all(p_.rollout_clip));
        loss *= truncated;
        slope *= truncated;
        sums[kRolloutWeightSum] += valid ? truncated : nothing;
      }
      sums[kPolicySum] += valid ? loss : nothing;
      sums[kRatioSum] += valid ? ratio : nothing;
      sums[kLogRatioSum] += valid ? log_ratio : nothing;
      sums[kClippedLow] += valid & clipped & (ratio < low) ? one : nothing;
      sums[kClippedHigh] += valid & clipped & (ratio > high) ? one : nothing;

      V gradient = slope;
      if (p_.sequence_ratio && !p_.weight_clip) {
        chain += valid ? slope : nothing;
        gradient = nothing;
      }
      if (p_.kl != KlEstimator::none) {
        V value, derivative;
        kl(logprob - K::read(at(p_.ref_logprobs, token), count), &value, &derivative);
        sums[kKlSum] += valid ? value : nothing;
        gradient += kl_coef * derivative;
      }
      if (p_.coefficient) {
        K::write(static_cast<Scalar*>(p_.coefficient) + token, valid ? weight * gradient : nothing, count);
      }
    }
    for (int sum = 0; sum < kLossSums; ++sum) sums_[sum] += K::sum(sums[sum]);
    chain_ += K::sum(chain);
  }

  PYKERN_INLINE void kl(V raw, V* value, V* derivative) const {
    if (p_.kl == KlEstimator::k1) {
      *value = raw;
      *derivative = K::all(1);
    } else if (p_.kl == KlEstimator::k2) {
      *value = raw * raw * K::all(0.5);
      *derivative = raw;
    } else {
      const V limit = K::all(p_.kl_log_ratio_limit), highest = K::all(p_.kl_limit), nothing = K::all(0);
      const V distance = clamp(raw, -limit, limit);
      K::k3(distance, value, derivative);
      const Condition held = (raw < -limit) | (raw > limit) | (*value > highest);
      *derivative = held ? nothing : *derivative;
      *value = *value > highest ? highest : *value;
    }
  }

  // The ratio of a sequence depends on each of its tokens by one over its length.
  void spread_gradient() {
    const int64_t length = p_.lengths[segment_.sequence];
    if (length == 0) return;
    const V share = K::all(chain_ / static_cast<double>(length) * p_.sequence_weight[segment_.sequence]);
    auto* coefficient = static_cast<Scalar*>(p_.coefficient);
    for (int64_t token = segment_.begin; token < segment_.end; token += K::kWidth) {
      const int64_t count = lanes(token, segment_.end);
      const V before = K::read(coefficient + token, count);
      K::write(coefficient + token, K::valid(mask_at(token), count) ? before + share : K::all(0), count);
    }
  }

  const PolicyLossParams& p_;
  const LossSegment segment_;
  double* sums_;
  double mean_ = 0, ratio_ = 1, chain_ = 0;
  bool limited_ = false;
};

}  // namespace

int64_t count_unmasked(const uint8_t* mask, int64_t count) {
  int64_t total = 0;
  for (int64_t token = 0; token < count; ++token) total += mask[token] != 0;
  return total;
}

void policy_loss_f32(const PolicyLossParams& params, int64_t segment) { Segment<vfloat>(params, segment).run(); }
void policy_loss_f64(const PolicyLossParams& params, int64_t segment) { Segment<double>(params, segment).run(); }

void scale_f32(const float* source, float factor, float* target, int64_t count) {
  for (int64_t token = 0; token < count; ++token) target[token] = source[token] * factor;
}

}  // namespace pykern::PYKERN_SIMD
