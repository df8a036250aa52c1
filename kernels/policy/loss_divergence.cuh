// KL estimates of four tokens, from the log-ratio to the reference, and their derivatives.
#pragma once

#include "kernels/policy/loss_tokens.cuh"

namespace pykern {

// exp(-d) + d - 1 and its derivative 1 - exp(-d). Near zero both cancel, so a series takes over; most
// policies stay so near to their reference that nothing else is needed.
__device__ __forceinline__ void k3_divergence(const FourTokens<float>& d, FourTokens<float>& value,
                                              FourTokens<float>& derivative) {
  bool all_near = true;
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) {
    float p = -1.0f / 362880;
    p = p * d[i] + 1.0f / 40320;
    p = p * d[i] - 1.0f / 5040;
    p = p * d[i] + 1.0f / 720;
    p = p * d[i] - 1.0f / 120;
    p = p * d[i] + 1.0f / 24;
    p = p * d[i] - 1.0f / 6;
    p = p * d[i] + 0.5f;
    value[i] = p * d[i] * d[i];
    derivative[i] = d[i] - value[i];
    all_near = all_near && fabsf(d[i]) < 0.5f;
  }
  if (all_near) return;
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) {
    const float e = finite_exponential(-d[i]);
    const bool near = fabsf(d[i]) < 0.5f;
    value[i] = near ? value[i] : e + (d[i] - 1.0f);
    derivative[i] = near ? derivative[i] : 1.0f - e;
  }
}
__device__ __forceinline__ void k3_divergence(const FourTokens<double>& d, FourTokens<double>& value,
                                              FourTokens<double>& derivative) {
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) {
    const double less_one = finite<double>(expm1(-d[i]), -d[i]);
    value[i] = less_one + d[i];
    derivative[i] = -less_one;
  }
}

// Only k3 has limits: of its input, and of its value.
template <class T>
__device__ __forceinline__ void limited_k3(const LossBounds<T>& bounds, FourTokens<T> raw, FourTokens<T>& value,
                                           FourTokens<T>& derivative) {
  const T limit = bounds.kl_log_ratio_limit, largest = bounds.kl_limit;
  FourTokens<T> held;
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) held[i] = clamp(raw[i], -limit, limit);
  k3_divergence(held, value, derivative);
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) {
    const bool beyond = raw[i] < -limit || raw[i] > limit || value[i] > largest;
    derivative[i] = beyond ? T(0) : derivative[i];
    value[i] = value[i] > largest ? largest : value[i];
  }
}

// k1, k2, k3 or the absolute value; the limits are k3's.
template <class T>
__device__ __forceinline__ void divergence(KlDivergence kind, const LossBounds<T>& bounds, bool limited,
                                           const FourTokens<T>& raw, FourTokens<T>& value, FourTokens<T>& derivative) {
#pragma unroll
  for (int i = 0; i < kThreadTokens; ++i) {
    value[i] = raw[i];
    derivative[i] = 1;
  }
  if (kind == KlDivergence::k2) {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      value[i] = raw[i] * raw[i] * T(0.5);
      derivative[i] = raw[i];
    }
  } else if (kind == KlDivergence::k3 && !limited) {
    k3_divergence(raw, value, derivative);
  } else if (kind == KlDivergence::k3) {
    limited_k3(bounds, raw, value, derivative);
  } else if (kind == KlDivergence::absolute) {
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i) {
      value[i] = raw[i] < 0 ? -raw[i] : raw[i];
      derivative[i] = raw[i] < 0 ? T(-1) : raw[i] > 0 ? T(1) : raw[i];
    }
  }
}

}  // namespace pykern
