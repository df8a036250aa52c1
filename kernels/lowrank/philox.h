// Random bits by counter: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), a function of a
// key and a counter alone. pykern/reference/lowrank_parts.py has the same.
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"
#include "kernels/common/numeric.h"

namespace pykern::lowrank {

// Elements that can share a call, with sixteen bits each.
constexpr int kPhiloxShares = 8;

struct PhiloxBits {
  uint32_t words[4];

  // The sixteen bits of a share, the low half of a word first. No array is indexed: it would lie in local memory.
  PYKERN_HOST_DEVICE uint32_t operator[](int share) const {
    const uint32_t low = share < 2 ? words[0] : words[1], high = share < 6 ? words[2] : words[3];
    return (share < 4 ? low : high) >> share % 2 * 16 & 0xffffu;
  }
};

// The words that `key` gives for the counter (index, step, 0), index in 64 bits.
PYKERN_HOST_DEVICE PhiloxBits philox(uint64_t key, uint64_t index, uint32_t step) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = step, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xd2511f53u} * c0, second = uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

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
