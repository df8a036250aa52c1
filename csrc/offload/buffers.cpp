#include "offload/buffers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "offload/medium.h"

namespace pykern {

Buffer::~Buffer() { pool_->give(data_, capacity_); }

BufferPool::~BufferPool() {
  for (const auto& [capacity, data] : free_) munmap(data, capacity);
}

std::shared_ptr<Buffer> BufferPool::take(int64_t bytes) {
  const int64_t capacity = std::max(kPage, whole_pages(bytes));
  char* data = nullptr;
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = free_.find(capacity);
    if (found != free_.end()) {
      data = found->second;
      free_.erase(found);
      cached_ -= capacity;
    } else {
      ++allocations_;
    }
  }
  if (!data) {
    void* mapped = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    data = static_cast<char*>(mapped);
  }
  return std::make_shared<Buffer>(shared_from_this(), data, capacity);
}

int64_t BufferPool::allocations() {
  const std::lock_guard<std::mutex> guard(mutex_);
  return allocations_;
}

void BufferPool::give(char* data, int64_t capacity) {
  if (poison_) std::memset(data, kPoison, capacity);
  std::multimap<int64_t, char*> evicted;
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    free_.emplace(capacity, data);
    cached_ += capacity;
    // The smallest go first: they are the cheapest to map again.
    while (cached_ > cache_limit_) {
      cached_ -= free_.begin()->first;
      evicted.insert(free_.extract(free_.begin()));
    }
  }
  for (const auto& [size, pages] : evicted) munmap(pages, size);
}

}  // namespace pykern
