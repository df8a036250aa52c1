// disco_loss: what the host hands to the kernels of one instruction-set level.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace pykern {

// Of the unmasked tokens of a sequence.
struct DiscoTokens {
  double count, scores, divergences;
};

// `mask` may be null. `ratio` and `k3` choose the score and the divergence.
PYKERN_SIMD_FUNCTION(DiscoTokens, disco_tokens_f32, (const float* logprobs, const float* old_logprobs,
                                                     const uint8_t* mask, int64_t count, bool ratio, bool k3))
PYKERN_SIMD_FUNCTION(DiscoTokens, disco_tokens_f64, (const double* logprobs, const double* old_logprobs,
                                                     const uint8_t* mask, int64_t count, bool ratio, bool k3))

// Gradients: of_score times the derivative of the score's term, plus of_divergence times that of the divergence's.
PYKERN_SIMD_FUNCTION(void, disco_gradient_f32, (const float* logprobs, const float* old_logprobs, const uint8_t* mask,
                                                int64_t count, bool ratio, bool k3, double of_score,
                                                double of_divergence, float* target))
PYKERN_SIMD_FUNCTION(void, disco_gradient_f64, (const double* logprobs, const double* old_logprobs,
                                                const uint8_t* mask, int64_t count, bool ratio, bool k3,
                                                double of_score, double of_divergence, double* target))

}  // namespace pykern
