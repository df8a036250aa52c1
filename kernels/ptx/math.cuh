// Instructions of the arithmetic units that CUDA C++ has no name for, or none that the emulator knows.
#pragma once

#include "kernels/common/device.h"

namespace pykern {

// 2^value by the special-function unit alone; relative error at most 2^-22, results below 2^-126 are 0.
// exp2f, on the same unit, spends three more instructions on those results.
__device__ __forceinline__ float fast_exp2(float value) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  const float result = exp2f(value);
  if (result < 1.17549435e-38f) return 0.0f;
  // Tests on the emulator meet an error of the unit's size.
  return __uint_as_float(__float_as_uint(result) & ~1u);
#endif
}

// log2 by the same unit: absolute error 2^-22 between 0.5 and 2, relative elsewhere; a subnormal operand is 0.
__device__ __forceinline__ float fast_log2(float value) {
#if defined(__CUDACC__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  return log2f(fabsf(value) < 1.17549435e-38f ? 0.0f : value);
#endif
}

// Relative error 2^-11; on the emulator as many bits are kept, so that nobody counts on more.
__device__ __forceinline__ float fast_tanh(float value) {
#if defined(__CUDACC__)
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  const float result = tanhf(value);
  return result != result ? result : __uint_as_float((__float_as_uint(result) + 0x800u) & ~0xfffu);
#endif
}

// The nearest tf32, ties away from zero, as the bits of a float that mma reads without loss.
__device__ __forceinline__ uint32_t round_tf32(float value) {
#if defined(__CUDACC__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) >= 0x7f800000u) return value != value ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & ~0x1fffu;
#endif
}

// --- the larger of two; a NaN loses against a number -------------------------------------------------------

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// --- two sixteen-bit elements in one register, the first one in the low half ------------------------------

template <class T>
struct Pair {
  uint32_t bits;
};

__device__ __forceinline__ float first(Pair<bf16> pair) { return __uint_as_float(pair.bits << 16); }
__device__ __forceinline__ float second(Pair<bf16> pair) { return __uint_as_float(pair.bits & 0xffff0000u); }
__device__ __forceinline__ float first(Pair<f16> pair) { return widen(f16{static_cast<uint16_t>(pair.bits)}); }
__device__ __forceinline__ float second(Pair<f16> pair) { return widen(f16{static_cast<uint16_t>(pair.bits >> 16)}); }

template <class T>
__device__ __forceinline__ Pair<T> pair_of(T low, T high) {
  return {uint32_t{low.bits} | uint32_t{high.bits} << 16};
}

#if defined(__CUDACC__)

__device__ __forceinline__ Pair<bf16> larger(Pair<bf16> a, Pair<bf16> b) {
  asm("max.bf16x2 %0, %0, %1;" : "+r"(a.bits) : "r"(b.bits));
  return a;
}
__device__ __forceinline__ Pair<f16> larger(Pair<f16> a, Pair<f16> b) {
  asm("max.f16x2 %0, %0, %1;" : "+r"(a.bits) : "r"(b.bits));
  return a;
}
__device__ __forceinline__ Pair<bf16> narrow_pair(float low, float high, bf16) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return {bits};
}
__device__ __forceinline__ Pair<f16> narrow_pair(float low, float high, f16) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return {bits};
}

#else

template <class T>
Pair<T> narrow_pair(float low, float high, T) {
  T narrow_low, narrow_high;
  narrow(low, narrow_low);
  narrow(high, narrow_high);
  return pair_of(narrow_low, narrow_high);
}
template <class T>
Pair<T> larger(Pair<T> a, Pair<T> b) {
  return narrow_pair(larger(first(a), first(b)), larger(second(a), second(b)), T{});
}

#endif

}  // namespace pykern
