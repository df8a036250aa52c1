// Philox4x32-10, the counter-based random numbers of Salmon et al. (SC 2011): the same bits on every device, whatever
// computes them in which order.
#pragma once

#include "kernels/common/numeric.h"

namespace pykern {

struct RandomWords {
  uint32_t words[4];
};

PYKERN_HOST_DEVICE RandomWords philox(uint64_t key, uint64_t low_counter, uint64_t high_counter) {
  uint32_t c0 = static_cast<uint32_t>(low_counter), c1 = static_cast<uint32_t>(low_counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(high_counter), c3 = static_cast<uint32_t>(high_counter >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * c0, second = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// In [0, 1), a multiple of 2^-24.
PYKERN_HOST_DEVICE float unit_interval(uint32_t word) { return static_cast<float>(word >> 8) * 5.9604644775390625e-8f; }

}  // namespace pykern
