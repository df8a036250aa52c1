// Four tokens next to each other, as a thread takes them from memory; a bit each says which are meant.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/vector.cuh"

namespace pykern {

constexpr int kQuad = 4;
constexpr unsigned kWholeQuad = 0xfu;

// Those of four tokens from `token` on that lie in [begin, end).
__device__ __forceinline__ unsigned quad_inside(int64_t token, int64_t begin, int64_t end) {
  unsigned inside = 0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) inside |= (token + i >= begin && token + i < end ? 1u : 0u) << i;
  return inside;
}

// Those of `inside` that are not masked. `packs`: all four can be read at once, here and below.
__device__ __forceinline__ unsigned quad_unmasked(const uint8_t* mask, unsigned inside, bool packs) {
  unsigned counts = inside;
  if (packs && inside == kWholeQuad) {
    const unsigned bytes = __ldcs(reinterpret_cast<const unsigned*>(mask));
#pragma unroll
    for (int i = 0; i < kQuad; ++i) counts &= ~((bytes >> (8 * i) & 0xffu ? 0u : 1u) << i);
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (inside >> i & 1 && !mask[i]) counts &= ~(1u << i);
    }
  }
  return counts;
}

// What is not wanted is not read, and zero.
template <class T>
__device__ __forceinline__ void load_quad(const T* source, unsigned wanted, bool packs, T (&target)[kQuad]) {
  if (packs && wanted == kWholeQuad) {
#pragma unroll
    for (int i = 0; i < kQuad; i += Pack<T>::kSize) {
      const Pack<T> pack = load_pack<Reuse::stream>(source + i);
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k) target[i + k] = pack[k];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) target[i] = wanted >> i & 1 ? source[i] : T(0);
}

template <class T>
__device__ __forceinline__ void store_quad(T* target, unsigned inside, bool packs, const T (&source)[kQuad]) {
  if (packs && inside == kWholeQuad) {
#pragma unroll
    for (int i = 0; i < kQuad; i += Pack<T>::kSize) {
      Pack<T> pack;
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k) pack[k] = source[i + k];
      store_pack<Reuse::stream>(target + i, pack);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    if (inside >> i & 1) target[i] = source[i];
  }
}

}  // namespace pykern
