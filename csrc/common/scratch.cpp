#include "common/scratch.h"

#include <cstdlib>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pykern {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;
// A kept block is memory that the process has no other use of.
constexpr size_t kMaxKept = size_t{128} << 20;

struct Block {
  void* pointer = nullptr;
  size_t bytes = 0;
};

std::mutex mutex;
Block kept;

}  // namespace

void* take_scratch(size_t bytes, size_t& capacity) {
  if (bytes >= kLargePage) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (kept.bytes >= bytes) {
      const Block block = std::exchange(kept, Block{});
      capacity = block.bytes;
      return block.pointer;
    }
  }
  // Large ones in large pages where the system gives them on demand; what fills none of these is left in small ones.
  capacity = (bytes + 2 * 64 - 1) / 64 * 64;
  void* pointer = nullptr;
  if (posix_memalign(&pointer, bytes < kLargePage ? 64 : kLargePage, capacity) != 0) return nullptr;
  if (bytes >= kLargePage) prefer_large_pages(pointer, capacity);
  return pointer;
}

void prefer_large_pages(void* pointer, size_t bytes) {
#if defined(__linux__)
  const size_t begin = (reinterpret_cast<size_t>(pointer) + kLargePage - 1) / kLargePage * kLargePage;
  const size_t end = (reinterpret_cast<size_t>(pointer) + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)pointer, (void)bytes;
#endif
}

void give_scratch(void* pointer, size_t capacity) {
  Block block{pointer, capacity};
  if (pointer && capacity >= kLargePage && capacity <= kMaxKept) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (capacity > kept.bytes) std::swap(block, kept);
  }
  std::free(block.pointer);
}

}  // namespace pykern
