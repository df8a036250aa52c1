// The Adam rule and the change of the weights, a vector at a time. Include from *.simd.cpp files only.
#pragma once

#include <cstdint>

#include "common/vector.h"
#include "lowrank/step.h"

namespace pykern::PYKERN_SIMD {

using lowrank::AdamRule;

PYKERN_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

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

  template <class T>
  PYKERN_INLINE void row(T* weights, const float* direction, int64_t columns) const {
    int64_t column = 0;
    for (; column + kLanes <= columns; column += kLanes) {
      store(weights + column, apply(load(weights + column), load(direction + column)));
    }
    if (column < columns) {
      const int64_t rest = columns - column;
      store_partial(weights + column, apply(load_partial(weights + column, rest), load(direction + column)), rest);
    }
  }

  // Adds the gradient to the direction, times one factor for the row or one for each column.
  template <class T>
  PYKERN_INLINE void row_with_gradient(T* weights, const float* direction, const T* gradient, vfloat row_factor,
                                       const float* column_factors, int64_t columns) const {
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t count = lesser(kLanes, columns - column);
      const bool whole = count == kLanes;
      const vfloat factor = column_factors ? load(column_factors + column) : row_factor;
      const vfloat slope = whole ? load(gradient + column) : load_partial(gradient + column, count);
      const vfloat old = whole ? load(weights + column) : load_partial(weights + column, count);
      const vfloat value = apply(old, load(direction + column) + slope * factor);
      if (whole) {
        store(weights + column, value);
      } else {
        store_partial(weights + column, value, count);
      }
    }
  }
};

// A tile of low-rank rows: `low` is scaled by the sign in place, the moments advance, and the
// direction times `scale` goes to `direction`, which may be `low`. Both have room for whole vectors.
inline void advance_tile(const Adam& adam, float scale, int64_t rows, int64_t columns, float* low, int64_t stride,
                  float* first, float* second, int64_t state_stride, float* direction) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      float* m = first + row * state_stride + column;
      float* v = second + row * state_stride + column;
      float* r = low + row * stride + column;
      float* n = direction + row * stride + column;
      const vfloat gradient = load(r) * adam.sign;
      store(r, gradient);
      const int64_t count = lesser(kLanes, columns - column);
      if (count == kLanes) {
        const Moments moments = adam.advance(gradient, {load(m), load(v)});
        store(m, moments.first);
        store(v, moments.second);
        store(n, adam.direction(moments) * scale);
      } else {
        const Moments moments = adam.advance(gradient, {load_partial(m, count), load_partial(v, count)});
        store_partial(m, moments.first, count);
        store_partial(v, moments.second, count);
        store_partial(n, adam.direction(moments) * scale, count);
      }
    }
  }
}

// The direction of moments that have advanced already.
PYKERN_INLINE vfloat direction_at(const Adam& adam, const float* first, const float* second, int64_t count) {
  if (count >= kLanes) return adam.direction({load(first), load(second)});
  return adam.direction({load_partial(first, count), load_partial(second, count)});
}

}  // namespace pykern::PYKERN_SIMD
