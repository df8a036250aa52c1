// Moments of tokens, and what whitening makes of them, in doubles.
#include "policy/whiten.h"

#include "common/vector_double.h"

namespace pykern::PYKERN_SIMD {
namespace {

constexpr double kInfinity = __builtin_inf();

// Sums of distances from one of the values: as exact as the spread of the values allows, whatever their offset.
template <class T>
TokenMoments moments(const T* values, const uint8_t* mask, int64_t count) {
  int64_t first = 0;
  while (mask && first < count && !mask[first]) ++first;
  if (first == count) return {0, kInfinity, -kInfinity, 0, 0};
  const double pivot = static_cast<double>(values[first]);
  vdouble sum = {}, squares = {}, low = broadcast(pivot), high = low;
  vlong counted = {};
  const auto add = [&](const T* from, vlong keep) __attribute__((always_inline)) {
    const vdouble value = load_doubles(from);
    // A NaN must not be lost in a comparison: it stays in the sum.
    const vdouble distance = keep ? value - pivot : vdouble{};
    sum += distance;
    squares += distance * distance;
    low = keep & (value < low) ? value : low;
    high = keep & (value > high) ? value : high;
    counted -= keep;
  };
  int64_t at = 0;
  for (; at + kDoubleLanes <= count; at += kDoubleLanes) {
    add(values + at, mask ? load_conditions(mask + at) : ~vlong{});
  }
  if (at < count) {
    T rest[kDoubleLanes] = {};
    uint8_t kept[kDoubleLanes] = {};
    for (int64_t i = at; i < count; ++i) {
      rest[i - at] = values[i];
      kept[i - at] = mask ? mask[i] : 1;
    }
    add(rest, load_conditions(kept));
  }
  TokenMoments result{0, pivot, pivot, 0, 0};
  double total = 0;
  for (int lane = 0; lane < kDoubleLanes; ++lane) {
    result.count += static_cast<double>(counted[lane]);
    total += sum[lane];
    result.squares += squares[lane];
    result.low = low[lane] < result.low ? low[lane] : result.low;
    result.high = high[lane] > result.high ? high[lane] : result.high;
  }
  const double offset = total / result.count;
  result.mean = pivot + offset;
  result.squares -= offset * total;
  return result;
}

template <class T>
void whiten(const T* values, const uint8_t* mask, int64_t count, const Whitening& by, T* target) {
  int64_t at = 0;
  for (; at + kDoubleLanes <= count; at += kDoubleLanes) {
    const vdouble whitened = (load_doubles(values + at) - by.mean) * by.scale + by.shift;
    store_doubles(target + at, mask ? (load_conditions(mask + at) ? whitened : vdouble{}) : whitened);
  }
  for (; at < count; ++at) {
    const double whitened = (static_cast<double>(values[at]) - by.mean) * by.scale + by.shift;
    target[at] = mask && !mask[at] ? T(0) : static_cast<T>(whitened);
  }
}

}  // namespace

TokenMoments token_moments_f32(const float* values, const uint8_t* mask, int64_t count) {
  return moments(values, mask, count);
}
TokenMoments token_moments_f64(const double* values, const uint8_t* mask, int64_t count) {
  return moments(values, mask, count);
}
void whiten_f32(const float* values, const uint8_t* mask, int64_t count, Whitening by, float* target) {
  whiten(values, mask, count, by, target);
}
void whiten_f64(const double* values, const uint8_t* mask, int64_t count, Whitening by, double* target) {
  whiten(values, mask, count, by, target);
}

}  // namespace pykern::PYKERN_SIMD
