// One value to one byte and back, for host and device: both give the same bytes, bit for bit. So every step is exact
// or rounds once, and no product is followed by a sum that a compiler could fuse with it.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "kernels/common/host_device.h"
#include "kernels/offload/staging.h"

namespace pykern {
namespace codec {

PYKERN_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

PYKERN_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

PYKERN_HOST_DEVICE uint32_t absolute_bits(float value) { return bits_of(value) & 0x7fffffffu; }

// What a value counts in the largest magnitude of its block: as bits, which compare as magnitudes do. NaN and
// infinity count nothing; the others keep their precision beside them.
PYKERN_HOST_DEVICE uint32_t finite_bits(float value) {
  const uint32_t bits = absolute_bits(value);
  return bits < kInfinityBits ? bits : 0;
}

// What the codes of a block are multiplied with. Never below the smallest normal number, so that its inverse is
// finite; and the largest magnitude is held a little below the largest float, so that rounding the scale up doesn't
// decode to infinity.
PYKERN_HOST_DEVICE float scale_of(uint32_t largest_bits, float range) {
  constexpr uint32_t kMost = 0x7f7ffff0u;
  const float scale = float_of(largest_bits < kMost ? largest_bits : kMost) / range;
  return scale > FLT_MIN ? scale : FLT_MIN;
}

// Four exponent bits, three mantissa bits, no infinity: torch.float8_e4m3fn. Rounds to nearest even.
struct Float8E4m3 {
  static constexpr float kRange = 448.0f;
  static constexpr uint8_t kNan = 0x7f;

  static PYKERN_HOST_DEVICE uint8_t encode_finite(float value, float inverse) {
    const float scaled = float_of(absolute_bits(value)) * inverse;
    const float magnitude = scaled < kRange ? scaled : kRange;
    // The unit in the last place is 2^-3 of the leading bit, and 2^-9 at least: adding 2^20 leading bits makes the
    // float32 adder round there. The number of units is then in the low bits of the sum, and what belongs to the
    // exponent comes on top of them.
    constexpr uint32_t kLeastExponent = 121;
    const uint32_t exponent = bits_of(magnitude) & kInfinityBits;
    const uint32_t leading = exponent > kLeastExponent << 23 ? exponent : kLeastExponent << 23;
    const uint32_t sum = bits_of(magnitude + float_of(leading + (20u << 23)));
    const uint32_t code = sum + (leading >> 20) - (kLeastExponent << 3);
    return static_cast<uint8_t>((code & 0x7fu) | (bits_of(value) >> 24 & 0x80u));
  }

  static PYKERN_HOST_DEVICE float decode(uint8_t code, float scale) {
    const uint32_t rest = code & 0x7fu;
    const float normal = float_of((rest << 20) + (120u << 23));
    // Without a leading bit: the fraction over 2^-6, less the 2^-6.
    const float subnormal = float_of((rest << 20) + (121u << 23)) - 0.015625f;
    const float magnitude = rest < 8 ? subnormal : rest == kNan ? float_of(0x7fc00000u) : normal;
    return float_of(bits_of(magnitude * scale) ^ (code & 0x80u) << 24);
  }
};

// -127 to 127, rounded to nearest even; -128 is NaN.
struct Int8 {
  static constexpr float kRange = 127.0f;
  static constexpr uint8_t kNan = 0x80;

  static PYKERN_HOST_DEVICE uint8_t encode_finite(float value, float inverse) {
    const float scaled = value * inverse;
    const float below = scaled < kRange ? scaled : kRange;
    const float limited = below > -kRange ? below : -kRange;
    // At 1.5 * 2^23 the unit in the last place is one; the low byte of the sum is the code.
    return static_cast<uint8_t>(bits_of(limited + 12582912.0f));
  }

  static PYKERN_HOST_DEVICE float decode(uint8_t code, float scale) {
    const float value = static_cast<float>(static_cast<int8_t>(code)) * scale;
    return code == kNan ? float_of(0x7fc00000u) : value;
  }
};

// Of any value; NaN and infinity become NaN.
template <class Codec>
PYKERN_HOST_DEVICE uint8_t encode(float value, float inverse) {
  return absolute_bits(value) < kInfinityBits ? Codec::encode_finite(value, inverse) : Codec::kNan;
}

}  // namespace codec
}  // namespace pykern
