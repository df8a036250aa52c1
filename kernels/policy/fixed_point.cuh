// Sums of doubles that are the same in any order: sums of integers, far finer than a double's.
#pragma once

#include <cmath>

#include "kernels/common/device.h"

namespace pykern {

using Word = unsigned long long;  // what 64-bit atomics take

__device__ __forceinline__ bool is_finite(double value) { return value - value == 0; }

// Words in the order of the doubles.
__device__ __forceinline__ Word ordered(double value) {
  const Word bits = static_cast<Word>(__double_as_longlong(value));
  return bits >> 63 ? ~bits : bits | Word{1} << 63;
}
__device__ __forceinline__ double from_ordered(Word word) {
  return __longlong_as_double(static_cast<long long>(word >> 63 ? word & ~(Word{1} << 63) : ~word));
}

// Terms of a sum whose magnitudes add up to less than 2^exponent, cut into two integers: the second holds
// 31 bits beyond the first, which has 61 below the exponent.
class FixedPoint {
 public:
  __device__ __forceinline__ FixedPoint(double largest, double count) {
    int of_largest, of_count;
    frexp(largest, &of_largest);
    frexp(count, &of_count);
    exponent_ = of_largest + of_count;
  }
  __device__ __forceinline__ void cut(double term, Word& high, Word& low) const {
    const double scaled = ldexp(term, 61 - exponent_), whole = rint(scaled);
    high = static_cast<Word>(static_cast<long long>(whole));
    low = static_cast<Word>(static_cast<long long>(rint((scaled - whole) * kLowUnits)));
  }
  __device__ __forceinline__ double join(Word high, Word low) const {
    const double sum = static_cast<double>(static_cast<long long>(high)) +
                       static_cast<double>(static_cast<long long>(low)) / kLowUnits;
    return ldexp(sum, exponent_ - 61);
  }

 private:
  static constexpr double kLowUnits = 2147483648.0;
  int exponent_;
};

// A mean within the range of the values, which rounding might leave.
__device__ __forceinline__ double mean_within(double sum, double weight, double low, double high) {
  const double quotient = weight > 0 ? sum / weight : 0;
  return quotient < low ? low : quotient > high ? high : quotient;
}

}  // namespace pykern
