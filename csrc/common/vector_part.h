// Vectors of which only the first lanes may lie in memory. Include from *.simd.cpp files only.
#pragma once

#include "common/vector.h"

namespace pykern::PYKERN_SIMD {

PYKERN_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Up to a vector: `count` elements, or all that it holds; the other lanes are zero.
template <class T>
PYKERN_INLINE vfloat load_some(const T* source, int64_t count) {
  return count >= kLanes ? load(source) : load_partial(source, count);
}

template <class T>
PYKERN_INLINE void store_some(T* target, vfloat value, int64_t count) {
  if (count >= kLanes) {
    store(target, value);
  } else {
    store_partial(target, value, count);
  }
}

}  // namespace pykern::PYKERN_SIMD
