// Vectors of float64, half as many as a vector of float32 has lanes. Include from *.simd.cpp files only.
#pragma once

#include "common/vector.h"

namespace pykern::PYKERN_SIMD {

constexpr int kDoubleLanes = kLanes / 2;

typedef double vdouble __attribute__((vector_size(kVectorBytes)));
typedef int64_t vlong __attribute__((vector_size(kVectorBytes)));
typedef float vhalffloat __attribute__((vector_size(kVectorBytes / 2)));
typedef int32_t vhalfint __attribute__((vector_size(kVectorBytes / 2)));

PYKERN_INLINE vdouble broadcast(double value) { return value - vdouble{}; }

PYKERN_INLINE vdouble load_doubles(const float* source) {
  vhalffloat half;
  std::memcpy(&half, source, sizeof half);
  return __builtin_convertvector(half, vdouble);
}
PYKERN_INLINE vdouble load_doubles(const double* source) {
  vdouble value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

PYKERN_INLINE void store_doubles(float* target, vdouble value) {
  const vhalffloat half = __builtin_convertvector(value, vhalffloat);
  std::memcpy(target, &half, sizeof half);
}
PYKERN_INLINE void store_doubles(double* target, vdouble value) { std::memcpy(target, &value, sizeof value); }

// Conditions of 32 bits, -1 or 0, as those of 64.
PYKERN_INLINE vlong load_conditions(const int32_t* source) {
  vhalfint half;
  std::memcpy(&half, source, sizeof half);
  return __builtin_convertvector(half, vlong);
}

// Bytes that are not zero.
PYKERN_INLINE vlong load_conditions(const uint8_t* source) {
#if defined(__AVX512F__)
  return (vlong)_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))) != 0;
#else
  vlong bytes;
  for (int lane = 0; lane < kDoubleLanes; ++lane) bytes[lane] = source[lane];
  return bytes != 0;
#endif
}

}  // namespace pykern::PYKERN_SIMD
