// Vectors of float32 as wide as the level has them, written once with the compiler's vector
// extension. Include from *.simd.cpp files only.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/numeric.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pykern::PYKERN_SIMD {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float vfloat __attribute__((vector_size(kVectorBytes)));
typedef int32_t vint __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vuint __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vhalf __attribute__((vector_size(kVectorBytes / 2)));

PYKERN_INLINE vfloat broadcast(float value) { return value - vfloat{}; }
PYKERN_INLINE vint broadcast(int32_t value) { return value - vint{}; }
PYKERN_INLINE vfloat zero() { return vfloat{}; }

// Written so that a NaN in `otherwise` survives a false comparison.
PYKERN_INLINE vfloat select(vint condition, vfloat chosen, vfloat otherwise) { return condition ? chosen : otherwise; }
PYKERN_INLINE vfloat maximum(vfloat a, vfloat b) { return a > b ? a : b; }
PYKERN_INLINE vfloat minimum(vfloat a, vfloat b) { return a < b ? a : b; }

// --- loads and stores, widening to and rounding from float32 ------------------------------------

PYKERN_INLINE vfloat load(const float* source) {
  vfloat value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

PYKERN_INLINE vfloat load(const bf16* source) {
  vhalf half;
  std::memcpy(&half, source, sizeof half);
  return (vfloat)(__builtin_convertvector(half, vuint) << 16);
}

PYKERN_INLINE float widen(float value) { return value; }

PYKERN_INLINE float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

PYKERN_INLINE float widen(f16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t rest = value.bits & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {
    // Subnormal: exact as a product of small integers.
    float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

PYKERN_INLINE void narrow(float value, float* target) { *target = value; }

PYKERN_INLINE void narrow(float value, bf16* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) {
    target->bits = static_cast<uint16_t>(bits >> 16 | 0x40);
  } else {
    target->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

PYKERN_INLINE void narrow(float value, f16* target) {
#if defined(__F16C__)
  target->bits = static_cast<uint16_t>(_cvtss_sh(value, 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00 | (bits >> 13 & 0x3ff);
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;
  } else if (bits >= 0x38800000) {
    half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  } else {
    // Subnormal: adding 0.5 lets the float32 adder round to the right place.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, sizeof half);
    half -= 0x3f000000;
  }
  target->bits = static_cast<uint16_t>(sign | half);
#endif
}

PYKERN_INLINE vfloat load(const f16* source) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  vfloat value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = widen(source[lane]);
  return value;
#endif
}

PYKERN_INLINE void store(float* target, vfloat value) { std::memcpy(target, &value, sizeof value); }

// Rounded to nearest, ties to even, in the low half of each lane; NaN stays NaN.
PYKERN_INLINE vuint round_to_bf16_bits(vfloat value) {
  const vuint bits = (vuint)value;
  const vuint rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const vuint quiet_nan = bits >> 16 | 0x40;
  return value != value ? quiet_nan : rounded;
}

PYKERN_INLINE void store(bf16* target, vfloat value) {
  const vhalf half = __builtin_convertvector(round_to_bf16_bits(value), vhalf);
  std::memcpy(target, &half, sizeof half);
}

PYKERN_INLINE void store(f16* target, vfloat value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph((__m512)value, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph((__m256)value, 0));
#else
  for (int lane = 0; lane < kLanes; ++lane) narrow(value[lane], target + lane);
#endif
}

// The first `count` < kLanes elements; the other lanes are zero and their memory is not touched.
template <class T>
PYKERN_INLINE vfloat load_partial(const T* source, int64_t count) {
#if defined(__AVX512F__)
  const auto lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    return (vfloat)_mm512_maskz_loadu_ps(lanes, source);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(lanes, source);
    return load(reinterpret_cast<const T*>(&halves));
  }
#else
  T buffer[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) buffer[lane] = source[lane];
  return load(buffer);
#endif
}

template <class T>
PYKERN_INLINE void store_partial(T* target, vfloat value, int64_t count) {
#if defined(__AVX512F__)
  const auto lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(target, lanes, (__m512)value);
  } else {
    __m256i halves;
    store(reinterpret_cast<T*>(&halves), value);
    _mm256_mask_storeu_epi16(target, lanes, halves);
  }
#else
  T buffer[kLanes];
  store(buffer, value);
  for (int64_t lane = 0; lane < count; ++lane) target[lane] = buffer[lane];
#endif
}

// --- reductions over the lanes, always in the same order -----------------------------------------

PYKERN_INLINE float sum_lanes(vfloat value) {
  float buffer[kLanes];
  store(buffer, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) buffer[lane] += buffer[lane + width];
  }
  return buffer[0];
}

PYKERN_INLINE float max_lanes(vfloat value) {
  float buffer[kLanes];
  store(buffer, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      buffer[lane] = buffer[lane] > buffer[lane + width] ? buffer[lane] : buffer[lane + width];
    }
  }
  return buffer[0];
}

// --- exp --------------------------------------------------------------------------------------

// e^x within 1.5 units in the last place, subnormal results and overflow to infinity included;
// NaN stays NaN. x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial in r.
PYKERN_INLINE vfloat exp(vfloat x) {
  const vfloat low = broadcast(-104.0f), high = broadcast(89.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vfloat magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat shifted = x * 1.44269504088896341f + magic;
  const vfloat n = shifted - magic;
  vfloat r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vfloat p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // 2^exponent in two factors, since its range is wider than that of a normal float32.
  const vint exponent = (vint)shifted - (vint)magic;
  const vint half = exponent >> 1;
  const vfloat first = (vfloat)((half + 127) << 23);
  const vfloat second = (vfloat)((exponent - half + 127) << 23);
  return p * first * second;
#endif
}

}  // namespace pykern::PYKERN_SIMD
