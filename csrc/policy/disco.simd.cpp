// Scores and divergences of a sequence's tokens, and their gradients. Written once for a vector of float32 and for a
// single double.
#include "policy/disco_tokens.h"
#include "policy/loss_terms.h"

namespace pykern::PYKERN_SIMD {
namespace {

// Sums of this many tokens stay in float32 lanes before they are added in double.
constexpr int64_t kBlock = 1024;

template <class V, class Scalar = typename Kind<V>::Scalar>
DiscoTokens measure(const Scalar* logprobs, const Scalar* old_logprobs, const uint8_t* mask, int64_t count, bool ratio,
                    bool k3) {
  using K = Kind<V>;
  const V zeros = K::all(0), ones = K::all(1);
  DiscoTokens result{0, 0, 0};
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t end = count - block < kBlock ? count : block + kBlock;
    V tokens = zeros, scores = zeros, divergences = zeros;
    for (int64_t at = block; at < end; at += K::kWidth) {
      const int64_t here = end - at < K::kWidth ? end - at : K::kWidth;
      const auto valid = K::valid(mask ? mask + at : nullptr, here);
      const V logprob = K::read(logprobs + at, here), d = logprob - K::read(old_logprobs + at, here);
      // Of -d: exp(d) - d - 1.
      V divergence, slope;
      K::k3(-d, &divergence, &slope);
      tokens += valid ? ones : zeros;
      scores += valid ? (ratio ? K::exponential(d) : logprob) : zeros;
      divergences += valid ? (k3 ? divergence : -d) : zeros;
    }
    result.count += K::sum(tokens);
    result.scores += K::sum(scores);
    result.divergences += K::sum(divergences);
  }
  return result;
}

template <class V, class Scalar = typename Kind<V>::Scalar>
void differentiate(const Scalar* logprobs, const Scalar* old_logprobs, const uint8_t* mask, int64_t count, bool ratio,
                   bool k3, double of_score, double of_divergence, Scalar* target) {
  using K = Kind<V>;
  const V zeros = K::all(0), ones = K::all(1), score = K::all(of_score), divergence = K::all(of_divergence);
  for (int64_t at = 0; at < count; at += K::kWidth) {
    const int64_t here = count - at < K::kWidth ? count - at : K::kWidth;
    const auto valid = K::valid(mask ? mask + at : nullptr, here);
    const V d = K::read(logprobs + at, here) - K::read(old_logprobs + at, here);
    V value, slope;
    K::k3(-d, &value, &slope);
    const V gradient = score * (ratio ? K::exponential(d) : ones) - divergence * (k3 ? slope : ones);
    K::write(target + at, valid ? gradient : zeros, here);
  }
}

}  // namespace

DiscoTokens disco_tokens_f32(const float* logprobs, const float* old_logprobs, const uint8_t* mask, int64_t count,
                             bool ratio, bool k3) {
  return measure<vfloat>(logprobs, old_logprobs, mask, count, ratio, k3);
}
DiscoTokens disco_tokens_f64(const double* logprobs, const double* old_logprobs, const uint8_t* mask, int64_t count,
                             bool ratio, bool k3) {
  return measure<double>(logprobs, old_logprobs, mask, count, ratio, k3);
}
void disco_gradient_f32(const float* logprobs, const float* old_logprobs, const uint8_t* mask, int64_t count,
                        bool ratio, bool k3, double of_score, double of_divergence, float* target) {
  differentiate<vfloat>(logprobs, old_logprobs, mask, count, ratio, k3, of_score, of_divergence, target);
}
void disco_gradient_f64(const double* logprobs, const double* old_logprobs, const uint8_t* mask, int64_t count,
                        bool ratio, bool k3, double of_score, double of_divergence, double* target) {
  differentiate<double>(logprobs, old_logprobs, mask, count, ratio, k3, of_score, of_divergence, target);
}

}  // namespace pykern::PYKERN_SIMD
