// masked_whiten: what the host hands to the kernels of one instruction-set level.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace pykern {

// Of the tokens that count in a run of them.
struct TokenMoments {
  double count, low, high, mean, squares;  // squares of the distances from the mean
};

// What a token x becomes: (x - mean) * scale + shift.
struct Whitening {
  double mean, scale, shift;
};

// `mask` may be null.
PYKERN_SIMD_FUNCTION(TokenMoments, token_moments_f32, (const float* values, const uint8_t* mask, int64_t count))
PYKERN_SIMD_FUNCTION(TokenMoments, token_moments_f64, (const double* values, const uint8_t* mask, int64_t count))
PYKERN_SIMD_FUNCTION(void, whiten_f32, (const float* values, const uint8_t* mask, int64_t count, Whitening by,
                                        float* target))
PYKERN_SIMD_FUNCTION(void, whiten_f64, (const double* values, const uint8_t* mask, int64_t count, Whitening by,
                                        double* target))

}  // namespace pykern
