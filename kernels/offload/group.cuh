// Neighbouring elements of a thread: sixteen bytes where addresses allow, else one.
#pragma once

#include "kernels/common/vector.cuh"

namespace pykern {

template <class T, bool packed>
struct Group {
  static constexpr int kSize = packed ? Pack<T>::kSize : 1;
  float values[kSize];

  static __device__ __forceinline__ Group load(const T* source) {
    Group group;
    if constexpr (packed) {
      const Pack<T> pack = load_pack(source);
#pragma unroll
      for (int i = 0; i < kSize; ++i) group.values[i] = widen(pack[i]);
    } else {
      group.values[0] = widen(*source);
    }
    return group;
  }

  __device__ __forceinline__ void store(T* target) const {
    if constexpr (packed) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < kSize; ++i) narrow(values[i], pack[i]);
      store_pack(target, pack);
    } else {
      narrow(values[0], *target);
    }
  }
};

}  // namespace pykern
