// Random bits for stochastic rounding: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), a
// function of a key and a counter alone. The CPU's code and the kernels include it, so that they draw the same bits.
//
// One call gives 128 bits, sixteen for each of eight elements: element e of a weight, counted through the rows of
// [n, length], takes half e mod 8 (the low half of a word first) of the call whose counter is (e / 8, step). Shared
// like that, the generator costs less than the weights' memory traffic.
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"

namespace pykern::lowrank {

constexpr int kPhiloxShares = 8;

struct PhiloxBits {
  uint32_t words[4];

  // The sixteen bits of element e with e mod 8 = share. No array is indexed: it would lie in local memory.
  PYKERN_HOST_DEVICE uint32_t operator[](int share) const {
    const uint32_t low = share < 2 ? words[0] : words[1], high = share < 6 ? words[2] : words[3];
    return (share < 4 ? low : high) >> share % 2 * 16 & 0xffffu;
  }
};

// `group` is e / 8.
PYKERN_HOST_DEVICE PhiloxBits philox(uint64_t key, uint64_t group, uint32_t step) {
  constexpr uint32_t kMultipliers[2] = {0xd2511f53u, 0xcd9e8d57u}, kWeyl[2] = {0x9e3779b9u, 0xbb67ae85u};
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = step, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{kMultipliers[0]} * c0, second = uint64_t{kMultipliers[1]} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += kWeyl[0];
    k1 += kWeyl[1];
  }
  return {{c0, c1, c2, c3}};
}

// A float, given as its bits, rounded to bfloat16 or float16: up with the probability of the share of a unit that is
// cut off, of which sixteen bits count. `bits` are an element's. NaN stays NaN, infinity stays; a value that rounds up
// beyond the largest becomes infinite.
PYKERN_HOST_DEVICE uint16_t stochastic_bf16(uint32_t value, uint32_t bits) {
  if ((value & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(value >> 16 | 0x40u);
  if ((value & 0x7f800000u) == 0x7f800000u) return static_cast<uint16_t>(value >> 16);
  return static_cast<uint16_t>((value + bits) >> 16);
}
PYKERN_HOST_DEVICE uint16_t stochastic_f16(uint32_t value, uint32_t bits) {
  const uint32_t sign = value >> 16 & 0x8000u, magnitude = value & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and more
  if (magnitude >= 0x38800000u) {
    // Thirteen bits are cut off; the exponent's bias falls by 112.
    const uint32_t rounded = (magnitude - 0x38000000u + (bits >> 3)) >> 13;
    return static_cast<uint16_t>(sign | rounded);
  }
  // Subnormal: in units of 2^-24, with the bits below aligned to the sixteen random ones.
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 87) return static_cast<uint16_t>(sign);  // below 2^-40, a share that sixteen bits can't tell from 0
  const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t cut = 126 - exponent;  // 14 to 39 bits below a unit
  const uint64_t fixed = uint64_t{significand} << 16 >> cut;  // in units of 2^-40
  return static_cast<uint16_t>(sign | static_cast<uint32_t>((fixed + bits) >> 16));
}

}  // namespace pykern::lowrank
