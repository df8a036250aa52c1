// Page-aligned memory for what comes back from the medium.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace pykern {

class BufferPool;

class Buffer {
 public:
  Buffer(std::shared_ptr<BufferPool> pool, char* data, int64_t capacity)
      : pool_(std::move(pool)), data_(data), capacity_(capacity) {}
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return data_; }

 private:
  const std::shared_ptr<BufferPool> pool_;
  char* const data_;
  const int64_t capacity_;
};

// Keeps up to `cache_limit` bytes of returned buffers, whose pages need no clearing by the kernel
// again. Memory comes from mmap, so that a freed buffer really leaves the process. Buffers keep
// their pool alive, and may be freed on any thread.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  BufferPool(int64_t cache_limit, bool poison) : cache_limit_(cache_limit), poison_(poison) {}
  ~BufferPool();

  // Null if there is no memory. Room for `bytes` rounded up to pages.
  std::shared_ptr<Buffer> take(int64_t bytes);
  // How often take() had to ask the system for memory.
  int64_t allocations();

 private:
  friend class Buffer;
  void give(char* data, int64_t capacity);

  const int64_t cache_limit_;
  const bool poison_;
  std::mutex mutex_;
  int64_t cached_ = 0, allocations_ = 0;
  std::multimap<int64_t, char*> free_;
};

}  // namespace pykern
