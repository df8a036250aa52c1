// From products of queries and keys to logits, and from those to weights. Include from *.simd.cpp files only.
//
#pragma once

#include "attention/prefix_attention.h"
#include "common/vector.h"

namespace pykern::PYKERN_SIMD {

constexpr float kInfinity = __builtin_inff();
constexpr double kLog2E = 1.4426950408889634074;

PYKERN_INLINE vfloat round_to_integers(vfloat value) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_roundscale_ps((__m512)value, 0);
#else
  const vfloat magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return (value + magic) - magic;
#endif
}

// value * 2^exponent for whole exponents between -151 and 129.
PYKERN_INLINE vfloat scale_by_power(vfloat value, vfloat exponent) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)value, (__m512)exponent);
#else
  // In two factors, since the range is wider than that of a normal float32.
  const vint whole = __builtin_convertvector(exponent, vint);
  const vint half = whole >> 1;
  return value * (vfloat)((half + 127) << 23) * (vfloat)((whole - half + 127) << 23);
#endif
}

// 2^x, exact at whole numbers; 0 below -150; NaN stays NaN; an x above 128 gives infinity or NaN. Within
// 2 units in the last place of float32, or 2^-18 where C is narrower.
template <class C>
PYKERN_INLINE vfloat exp2(vfloat x) {
  // Written so that x is taken where it is NaN.
  x = maximum(broadcast(-151.0f), x);
#if !defined(__AVX512F__)
  x = minimum(broadcast(129.0f), x);
#endif
  const vfloat n = round_to_integers(x);
  const vfloat r = x - n;
  vfloat p;
  if constexpr (sizeof(C) == sizeof(float)) {
    p = broadcast(1.535336196e-04f);
    p = p * r + 1.339887502e-03f;
    p = p * r + 9.618436918e-03f;
    p = p * r + 5.550332367e-02f;
    p = p * r + 2.402264774e-01f;
    p = p * r + 6.931471825e-01f;
  } else {
    p = broadcast(9.582852945e-03f);
    p = p * r + 5.590642616e-02f;
    p = p * r + 2.402409911e-01f;
    p = p * r + 6.931241751e-01f;
  }
  p = p * r + 1.0f;
  return scale_by_power(p, n);
}

// Within 4 units in the last place, small arguments included; NaN stays NaN.
PYKERN_INLINE vfloat tanh(vfloat x) {
  const vint sign = (vint)x & INT32_MIN;
  const vfloat magnitude = (vfloat)((vint)x ^ sign);
  // e = e^(2x) - 1 and tanh = e / (e + 2).
  const vfloat y = minimum(broadcast(40.0f), magnitude * static_cast<float>(2.0 * kLog2E));
  const vfloat n = round_to_integers(y);
  const vfloat r = y - n;
  vfloat q = broadcast(1.540351222e-04f);
  q = q * r + 1.339073526e-03f;
  q = q * r + 9.618237615e-03f;
  q = q * r + 5.550357327e-02f;
  q = q * r + 2.402264923e-01f;
  q = q * r + 6.931471825e-01f;
  const vfloat power = scale_by_power(broadcast(1.0f), n);
  const vfloat e = power * (q * r) + (power - 1.0f);
  return (vfloat)((vint)(e / (e + 2.0f)) | sign);
}

// A row of keys as the mask and the distances know them.
struct KeyColumns {
  const int32_t *row, *end, *position;
};

PYKERN_INLINE vint load(const int32_t* source) {
  vint value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

struct Score {
  float scale, softcap;
  float inner;  // with a softcap, logits are softcap * tanh(inner * product)
  bool capped, windowed;
  const float* slopes;  // [query_heads], or null
  // A logit is the product times the scale, and larger where that is.
  bool plain;

  PYKERN_INLINE explicit Score(const PrefixAttention& problem)
      : scale(static_cast<float>(problem.scale)),
        softcap(static_cast<float>(problem.softcap)),
        inner(problem.softcap > 0.0 ? static_cast<float>(problem.scale / problem.softcap) : 0.0f),
        capped(problem.softcap > 0.0),
        windowed(problem.window > 0),
        slopes(static_cast<const float*>(problem.alibi_slopes)),
        plain(!capped && !slopes && scale > 0.0f) {}
};

// One token as a query.
struct QueryToken {
  int32_t row = -1;  // -1: sees nothing
  int32_t position = 0;
  int32_t horizon = 0;  // no key at or before this position is seen

  PYKERN_INLINE QueryToken() = default;
  PYKERN_INLINE QueryToken(const PrefixAttention& problem, int64_t token, bool real)
      : row(real ? static_cast<int32_t>(token) : -1),
        position(real ? problem.position[token] : 0),
        horizon(problem.horizon(position)) {}

  PYKERN_INLINE vint sees(const KeyColumns& keys, int64_t column, bool windowed) const {
    vint seen = (load(keys.row + column) <= row) & (row < load(keys.end + column));
    if (windowed) seen &= load(keys.position + column) > horizon;
    return seen;
  }

  PYKERN_INLINE vfloat distance(const KeyColumns& keys, int64_t column) const {
    return __builtin_convertvector(position - load(keys.position + column), vfloat);
  }
};

}  // namespace pykern::PYKERN_SIMD
