// Sixteen bytes at a time between memory and registers.
#pragma once

#include "kernels/common/device.h"

namespace pykern {

// As many elements as sixteen bytes hold.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];

  __device__ __forceinline__ T& operator[](int index) { return values[index]; }
  __device__ __forceinline__ const T& operator[](int index) const { return values[index]; }
};

// What a load or store says of its line: read or written again soon, or not.
enum class Reuse { keep, stream };

template <Reuse reuse = Reuse::keep, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* source) {
#if defined(__CUDACC__)
  union {
    int4 bits;
    Pack<T> pack;
  } both;
  const int4* address = reinterpret_cast<const int4*>(source);
  both.bits = reuse == Reuse::stream ? __ldcs(address) : *address;
  return both.pack;
#else
  return emulator::load_vector<Pack<T>>(source);
#endif
}

// To global memory. Intrinsics, since nvcc may take an ordinary store of sixteen bytes apart, element by element,
// where it can't see that the index is a multiple of the pack.
template <Reuse reuse = Reuse::keep, class T>
__device__ __forceinline__ void store_pack(T* target, const Pack<T>& pack) {
#if defined(__CUDACC__)
  union {
    int4 bits;
    Pack<T> pack;
  } both;
  both.pack = pack;
  int4* address = reinterpret_cast<int4*>(target);
  if (reuse == Reuse::stream) {
    __stcs(address, both.bits);
  } else {
    __stwb(address, both.bits);
  }
#else
  emulator::store_vector(target, pack);
#endif
}

// Whether a pointer, and rows `stride` elements apart, allow sixteen-byte accesses.
template <class T>
__host__ __device__ __forceinline__ bool allows_packs(const T* pointer, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

}  // namespace pykern
