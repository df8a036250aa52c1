// Memory that one op call needs and frees again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/numeric.h"

namespace pykern {

// Uninitialised, aligned to a cache line and to the widest vector. `get` is null if the machine
// has no memory left; the host wrapper turns that into an error.
class Scratch {
 public:
  PYKERN_INLINE explicit Scratch(size_t bytes) {
    // Large ones in large pages where the system gives them on demand: the first touch of a page costs
    // more than what is done with a small one.
    const size_t page = bytes < kLargePage ? 64 : kLargePage;
    pointer_ = std::aligned_alloc(page, (bytes + 64 + page - 1) / page * page);
#if defined(__linux__)
    if (pointer_ && page == kLargePage) madvise(pointer_, bytes, MADV_HUGEPAGE);
#endif
  }
  PYKERN_INLINE ~Scratch() { std::free(pointer_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  PYKERN_INLINE T* get() const {
    return static_cast<T*>(pointer_);
  }

 private:
  static constexpr size_t kLargePage = size_t{2} << 20;
  void* pointer_;
};

PYKERN_INLINE constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
PYKERN_INLINE constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace pykern
