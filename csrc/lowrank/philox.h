// Random numbers by counter: Philox4x32-10 (Salmon et al., SC 2011), one number for each lane. Include from *.simd.cpp
// files only. pykern/reference/philox.py has the same.
#pragma once

#include "common/vector.h"

namespace pykern::PYKERN_SIMD {

typedef uint64_t vulong __attribute__((vector_size(kVectorBytes)));

// Products of the lower halves of 64-bit lanes; what the upper halves hold means nothing.
PYKERN_INLINE vulong multiply_lower(vulong a, uint32_t b) {
#if defined(__AVX512F__)
  return (vulong)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vulong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

// In the lower halves, the first of the four words that key `seed` gives for the counters (index, step, 0).
PYKERN_INLINE vulong philox(uint64_t seed, vulong index, uint32_t step) {
  vulong counter[4] = {index, index >> 32, static_cast<uint64_t>(step) + vulong{}, vulong{}};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const vulong first = multiply_lower(counter[0], 0xd2511f53u), second = multiply_lower(counter[2], 0xcd9e8d57u);
    counter[0] = second >> 32 ^ counter[1] ^ static_cast<uint64_t>(key0);
    counter[1] = second;
    counter[2] = first >> 32 ^ counter[3] ^ static_cast<uint64_t>(key1);
    counter[3] = first;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter[0];
}

// The words of elements first, first + stride, ...: one for each lane of 32 bits.
PYKERN_INLINE vuint philox_from(uint64_t seed, int64_t first, int64_t stride, uint32_t step) {
  vulong even;
  for (int lane = 0; lane < kLanes / 2; ++lane) even[lane] = static_cast<uint64_t>(first + 2 * lane * stride);
  const vulong odd = even + static_cast<uint64_t>(stride);
  return (vuint)((philox(seed, even, step) & 0xffffffffu) | philox(seed, odd, step) << 32);
}

// --- stochastic rounding ----------------------------------------------------------------------------
// What a value has beyond the magnitude below it, as a part of the unit there, is the probability of going up: up where
// floor(part * 2^24) + (word >> 8) reaches 2^24. Infinities and NaN stay.

// The result is of type T already, so that storing it rounds no more. Float32 has nothing to round.
template <class T>
PYKERN_INLINE vfloat round_stochastic(vfloat value, vuint words);

template <>
PYKERN_INLINE vfloat round_stochastic<float>(vfloat value, vuint) {
  return value;
}

template <>
PYKERN_INLINE vfloat round_stochastic<bf16>(vfloat value, vuint words) {
  const vuint raised = ((vuint)value + (words >> 16)) & 0xffff0000u;
  return value != value ? value : (vfloat)raised;
}

template <>
PYKERN_INLINE vfloat round_stochastic<f16>(vfloat value, vuint words) {
  const vint bits = (vint)value & 0x7fffffff;
  vint exponent = bits >> 23;
  const vint finite = exponent != 255;
  exponent = exponent > 113 ? exponent : broadcast(113);  // below it float16 is subnormal, with one unit for all
  const vfloat unit = (vfloat)((exponent - 10) << 23), inverse = (vfloat)((264 - exponent) << 23);
  const vfloat units = (finite ? (vfloat)bits : zero()) * inverse;
  const vint below = __builtin_convertvector(units, vint);
  const vfloat part = units - __builtin_convertvector(below, vfloat);
  const vint up = __builtin_convertvector(part * 16777216.0f, vint) + (vint)(words >> 8) >= 0x1000000;
  const vfloat magnitude = __builtin_convertvector(below - up, vfloat) * unit;
  const vfloat rounded = (vfloat)((vint)magnitude | ((vint)value & static_cast<int32_t>(0x80000000u)));
  return finite ? rounded : value;
}

}  // namespace pykern::PYKERN_SIMD
