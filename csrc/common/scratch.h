// Memory that one op call needs and frees again.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/numeric.h"

namespace pykern {

// The largest block that was given back is kept for the next taker, up to 128 MiB: a training step calls the same ops
// again and again, and the first touch of fresh pages costs as much as what is done with them.
void* take_scratch(size_t bytes, size_t& capacity);
void give_scratch(void* pointer, size_t capacity);

// For memory of others that has not been touched yet.
void prefer_large_pages(void* pointer, size_t bytes);

// Uninitialised, aligned to a cache line and to the widest vector. `get` is null if the machine
// has no memory left; the host wrapper turns that into an error.
class Scratch {
 public:
  PYKERN_INLINE explicit Scratch(size_t bytes) : pointer_(take_scratch(bytes, capacity_)) {}
  PYKERN_INLINE ~Scratch() { give_scratch(pointer_, capacity_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  PYKERN_INLINE T* get() const {
    return static_cast<T*>(pointer_);
  }

 private:
  size_t capacity_ = 0;
  void* pointer_;
};

PYKERN_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
PYKERN_INLINE constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace pykern
