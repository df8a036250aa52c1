// Activation functions and their derivatives at one float. csrc/offload/pointwise.simd.cpp has the same for vectors.
#pragma once

#include <cmath>

#include "kernels/common/host_device.h"

namespace pykern {

// In the order of ACTIVATIONS in pykern/offload/pointwise.py.
enum class Activation : int { silu, gelu, gelu_tanh };

struct ValueAndSlope {
  float value, slope;
};

// For slopes: beyond it they are 0 or 1, and an infinity would meet a zero there.
PYKERN_HOST_DEVICE float bounded(float x) {
  x = x < -100.0f ? -100.0f : x;
  return x > 100.0f ? 100.0f : x;
}

// exp(z^2) erfc(z) / 2 at z = |x| / sqrt(2), as a polynomial in t = 1 / (1 + 0.45 z): within 4e-8 of itself everywhere,
// so the tail's relative error is small too. For floats, and for vectors of them.
constexpr float kTailScale = 0.318198052f;  // 0.45 / sqrt(2)

template <class Value>
PYKERN_HOST_DEVICE Value normal_tail(Value t) {
  Value p = t * -0.02066756025f + 0.0952221845f;
  p = p * t - 0.150069918f;
  p = p * t + 0.070982356f;
  p = p * t - 0.01105245965f;
  p = p * t + 0.0599313685f;
  p = p * t + 0.087634874f;
  p = p * t + 0.1141348765f;
  p = p * t + 0.1269416265f;
  p = p * t + 0.12694266f;
  return p * t;
}

// x Phi(x).
PYKERN_HOST_DEVICE ValueAndSlope gelu(float x) {
  const float bell = expf(-0.5f * x * x), tail = bell * normal_tail(1.0f / (1.0f + kTailScale * fabsf(x)));
  const float below = x < 0 ? tail : 1.0f - tail;
  return {x * below, below + bounded(x) * (bell * 0.398942280f)};
}

// x times the logistic function of `inner`, whose derivative is `inner_slope`.
PYKERN_HOST_DEVICE ValueAndSlope logistic_unit(float x, float inner, float inner_slope) {
  const float e = expf(-inner), share = 1.0f / (1.0f + e), rest = inner < 0 ? 1.0f - share : e * share;
  return {x * share, share * (1.0f + bounded(x) * rest * inner_slope)};
}

PYKERN_HOST_DEVICE ValueAndSlope silu(float x) { return logistic_unit(x, x, 1.0f); }

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3); (1 + tanh(u)) / 2 is the logistic function of 2 u.
PYKERN_HOST_DEVICE ValueAndSlope gelu_tanh(float x) {
  const float square = bounded(x) * bounded(x);
  return logistic_unit(x, x * (1.595769122f + 0.0713548163f * square), 1.595769122f + 0.2140644488f * square);
}

PYKERN_HOST_DEVICE ValueAndSlope activation_at(Activation kind, float x) {
  if (kind == Activation::silu) return silu(x);
  return kind == Activation::gelu ? gelu(x) : gelu_tanh(x);
}

}  // namespace pykern
