// What kernels/offload/activation_math.h and pointwise_sm80.cuh compute, a vector at a time.
#include "offload/pointwise.h"

#include "common/vector_part.h"
#include "kernels/common/philox.h"

namespace pykern::PYKERN_SIMD {
namespace {

struct Terms {
  vfloat value, slope;
};

PYKERN_INLINE vfloat magnitude(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }
PYKERN_INLINE vfloat bounded_part(vfloat x) {
  x = select(x < -100.0f, broadcast(-100.0f), x);
  return select(x > 100.0f, broadcast(100.0f), x);
}

// exp(-square / 2), within 3e-7 of itself but for the rounding of `square`; 0 above 174, where it is hardly normal.
PYKERN_INLINE vfloat bell_of(vfloat square) {
  const vfloat rounding = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat shifted = square * -0.721347520f + rounding;
  const vfloat rest = square + (shifted - rounding) * 1.386294361f;
  vfloat p = rest * 2.16306944e-05f - 0.000261692621f;
  p = p * rest + 0.00260425010f;
  p = p * rest - 0.0208330397f;
  p = p * rest + 0.124999985f;
  p = p * rest - 0.5f;
  p = p * rest + 1.0f;
  const vfloat power_of_two = (vfloat)(((vint)shifted - (vint)rounding + 127) << 23);
  return select(square > 174.0f, zero(), p * power_of_two);
}

PYKERN_INLINE Terms gelu_of(vfloat x) {
  const vfloat distance = minimum(broadcast(14.0f), magnitude(x)), bell = bell_of(distance * distance);
  const vfloat tail = normal_tail(1.0f / (1.0f + kTailScale * distance));
  // Below zero; above, both are what is missing to 1.
  const vfloat share = bell * tail, slope = bell * (tail - distance * 0.398942280f);
  return {x * select(x < 0, share, 1.0f - share), select(x < 0, slope, 1.0f - slope)};
}

PYKERN_INLINE Terms logistic_terms(vfloat x, vfloat inner, vfloat inner_slope) {
  const vfloat e = exp(-inner), share = 1.0f / (1.0f + e), rest = select(inner < 0, 1.0f - share, e * share);
  return {x * share, share * (1.0f + bounded_part(x) * rest * inner_slope)};
}

PYKERN_INLINE Terms silu_of(vfloat x) { return logistic_terms(x, x, broadcast(1.0f)); }

PYKERN_INLINE Terms gelu_tanh_of(vfloat x) {
  const vfloat square = bounded_part(x) * bounded_part(x);
  return logistic_terms(x, x * (1.595769122f + 0.0713548163f * square), 1.595769122f + 0.2140644488f * square);
}

template <class T, bool backward, class Function>
PYKERN_INLINE void elements_by(const ActivationParams& p, int64_t begin, int64_t end, const Function& function) {
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  const T* grad = static_cast<const T*>(p.grad);
  T *gate_out = static_cast<T*>(p.gate_out), *up_out = static_cast<T*>(p.up_out);
  const auto visit = [&](int64_t i, int64_t count) {
    const Terms at = function(load_some(gate + i, count));
    const vfloat factor = up ? load_some(up + i, count) : broadcast(1.0f);
    if constexpr (!backward) return store_some(gate_out + i, at.value * factor, count);
    const vfloat g = load_some(grad + i, count);
    store_some(gate_out + i, g * factor * at.slope, count);
    if (up) store_some(up_out + i, g * at.value, count);
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) visit(i, int64_t{kLanes});
  if (i < end) visit(i, end - i);
}

template <class T, bool backward>
void activation_of(const ActivationParams& p, int64_t begin, int64_t end) {
  const auto by = [&](const auto& function) { elements_by<T, backward>(p, begin, end, function); };
  switch (p.kind) {
    case Activation::silu: return by([](vfloat x) { return silu_of(x); });
    case Activation::gelu: return by([](vfloat x) { return gelu_of(x); });
    case Activation::gelu_tanh: return by([](vfloat x) { return gelu_tanh_of(x); });
  }
}

template <class T>
void activation_of(const ActivationParams& p, int64_t begin, int64_t end) {
  p.grad ? activation_of<T, true>(p, begin, end) : activation_of<T, false>(p, begin, end);
}

// Calls of Philox whose words are made together: a loop that the compiler turns into vectors.
constexpr int kCalls = 16;

template <class T>
void dropout_of(const DropoutParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const bool drops_all = p.threshold > 0xffffffffu;
  const vuint threshold = static_cast<uint32_t>(p.threshold) + vuint{};
  alignas(64) uint32_t words[4 * kCalls];
  for (int64_t first = begin; first < end; first += 4 * kCalls) {
    for (int call = 0; call < kCalls; ++call) {
      const PhiloxBits bits = philox(seed, static_cast<uint64_t>(first / 4 + call), 0);
      for (int i = 0; i < 4; ++i) words[4 * call + i] = bits.words[i];
    }
    for (int i = 0; i < 4 * kCalls && first + i < end; i += kLanes) {
      const int64_t count = end - first - i;
      vuint word;
      __builtin_memcpy(&word, words + i, sizeof word);
      const vfloat kept = select((vint)(word >= threshold), load_some(x + first + i, count) * p.scale, zero());
      store_some(y + first + i, drops_all ? zero() : kept, count);
    }
  }
}

}  // namespace

void activation_elements(DataType type, const ActivationParams& params, int64_t begin, int64_t end) {
  if (type == DataType::f32) return activation_of<float>(params, begin, end);
  if (type == DataType::bf16) return activation_of<bf16>(params, begin, end);
  activation_of<f16>(params, begin, end);
}

void dropout_elements(DataType type, const DropoutParams& params, int64_t begin, int64_t end) {
  if (type == DataType::f32) return dropout_of<float>(params, begin, end);
  if (type == DataType::bf16) return dropout_of<bf16>(params, begin, end);
  dropout_of<f16>(params, begin, end);
}

}  // namespace pykern::PYKERN_SIMD
