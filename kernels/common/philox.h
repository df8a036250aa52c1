// Random bits by counter: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), a function of a
// key and a counter alone. pykern/reference/philox.py has the same.
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"

namespace pykern {

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

struct PhiloxKeys {
  uint32_t first, second;

  PYKERN_HOST_DEVICE explicit PhiloxKeys(uint64_t key)
      : first(static_cast<uint32_t>(key)), second(static_cast<uint32_t>(key >> 32)) {}
  PYKERN_HOST_DEVICE void next() {
    first += 0x9e3779b9u;
    second += 0xbb67ae85u;
  }
};

// One of the ten rounds.
PYKERN_HOST_DEVICE void mix_philox(PhiloxBits& bits, const PhiloxKeys& keys) {
  uint32_t(&c)[4] = bits.words;
  const uint64_t first = uint64_t{0xd2511f53u} * c[0], second = uint64_t{0xcd9e8d57u} * c[2];
  bits = {{static_cast<uint32_t>(second >> 32) ^ c[1] ^ keys.first, static_cast<uint32_t>(second),
           static_cast<uint32_t>(first >> 32) ^ c[3] ^ keys.second, static_cast<uint32_t>(first)}};
}

// The words that `key` gives for the counter (index, step, 0), index in 64 bits.
PYKERN_HOST_DEVICE PhiloxBits philox(uint64_t key, uint64_t index, uint32_t step) {
  PhiloxBits bits{{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), step, 0}};
  PhiloxKeys keys(key);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round, keys.next()) mix_philox(bits, keys);
  return bits;
}

}  // namespace pykern
