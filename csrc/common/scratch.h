// Memory that one op call needs and frees again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "common/numeric.h"

namespace pykern {

// Uninitialised, aligned to a cache line and to the widest vector. `get` is null if the machine
// has no memory left; the host wrapper turns that into an error.
class Scratch {
 public:
  PYKERN_INLINE explicit Scratch(size_t bytes) : pointer_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  PYKERN_INLINE ~Scratch() { std::free(pointer_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  PYKERN_INLINE T* get() const {
    return static_cast<T*>(pointer_);
  }

 private:
  void* pointer_;
};

PYKERN_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
PYKERN_INLINE constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace pykern
