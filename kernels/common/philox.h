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

}  // namespace pykern
