// Rounding to a narrower type by random bits.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/philox.h"

namespace pykern::lowrank {

// A float, given as its bits, up or down to a neighbour in the narrower type: what it has beyond the magnitude below it
// is the probability of going up, in as many of the word's upper bits as the type cuts off, but at most 24. Infinities
// and NaN stay. csrc/lowrank/philox.h rounds vectors alike.
PYKERN_HOST_DEVICE bf16 round_stochastic(uint32_t value, uint32_t word, bf16) {
  if ((value & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(value >> 16 | 0x40u)};
  return {static_cast<uint16_t>((value + (word >> 16)) >> 16)};
}

PYKERN_HOST_DEVICE f16 round_stochastic(uint32_t value, uint32_t word, f16) {
  const uint32_t sign = value >> 16 & 0x8000u, magnitude = value & 0x7fffffffu, exponent = magnitude >> 23;
  uint32_t rounded;
  if (exponent >= 143) {  // 65536 and more
    rounded = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (exponent >= 113) {
    // Thirteen bits are cut off, and the exponent's bias falls by 112.
    rounded = (magnitude - 0x38000000u + (word >> 19)) >> 13;
  } else if (exponent >= 79) {
    // Subnormal: a multiple of 2^-24, with 24 bits below.
    const uint64_t fixed = uint64_t{(magnitude & 0x7fffffu) | 0x800000u} << 24 >> (126 - exponent);
    rounded = static_cast<uint32_t>((fixed + (word >> 8)) >> 24);
  } else {
    rounded = 0;
  }
  return {static_cast<uint16_t>(sign | rounded)};
}

}  // namespace pykern::lowrank
