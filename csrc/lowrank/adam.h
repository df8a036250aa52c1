// The Adam rule and the change of the weights, a vector at a time. Include from *.simd.cpp files only.
#pragma once

#include <cstdint>

#include "common/vector_part.h"
#include "lowrank/step.h"

namespace pykern::PYKERN_SIMD {

using lowrank::AdamRule;

PYKERN_INLINE vfloat square_root(vfloat value) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)value);
#else
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = __builtin_sqrtf(value[lane]);
  return value;
#endif
}

struct Moments {
  vfloat first, second;
};

// The Adam rule in float32; its constants are rounded once.
struct Adam {
  float beta1, rest1, beta2, rest2, first, second, eps, sign;

  PYKERN_INLINE explicit Adam(const AdamRule& rule)
      : beta1(static_cast<float>(rule.beta1)),
        rest1(static_cast<float>(1 - rule.beta1)),
        beta2(static_cast<float>(rule.beta2)),
        rest2(static_cast<float>(1 - rule.beta2)),
        first(static_cast<float>(rule.first)),
        second(static_cast<float>(rule.second)),
        eps(static_cast<float>(rule.eps)),
        sign(static_cast<float>(rule.sign)) {}

  PYKERN_INLINE Moments advance(vfloat gradient, Moments old) const {
    return {old.first * beta1 + gradient * rest1, old.second * beta2 + gradient * gradient * rest2};
  }
  PYKERN_INLINE vfloat direction(Moments moments) const {
    return moments.first * first / (square_root(moments.second) * second + eps);
  }
};

// w <- decay * w - step_size * direction, as a small change of w: 1 - decay keeps more digits than decay.
struct WeightUpdate {
  float shrink, step_size;

  PYKERN_INLINE explicit WeightUpdate(const AdamRule& rule)
      : shrink(static_cast<float>(1 - rule.decay)), step_size(static_cast<float>(rule.step_size)) {}

  PYKERN_INLINE vfloat apply(vfloat weight, vfloat direction) const {
    return weight - (weight * shrink + direction * step_size);
  }
};

// The direction of moments that have advanced already.
PYKERN_INLINE vfloat direction_at(const Adam& adam, const float* first, const float* second, int64_t count) {
  return adam.direction({load_some(first, count), load_some(second, count)});
}

}  // namespace pykern::PYKERN_SIMD
