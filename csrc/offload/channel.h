// Transfers between memory and a file, several at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "offload/requests.h"

namespace pykern {

// Used by one thread at a time. Numbers are below kDepth, and each is in flight once at most.
class Channel {
 public:
  struct Transfer {
    bool write = false;
    int64_t offset = 0;  // in the file
    char* data = nullptr;
    int64_t bytes = 0;
  };
  struct Ended {
    int number;
    int64_t result;  // bytes, possibly fewer than asked for, or the negative error number
  };

  virtual ~Channel() = default;
  virtual void start(int number, const Transfer& transfer) = 0;
  // Waits for one of those that were started. Their memory is in use until then.
  virtual Ended wait() = 0;
};

// By pread and pwrite, each of which ends before `start` returns.
std::unique_ptr<Channel> make_blocking_channel(int file);
// By io_uring; null where the kernel or the container refuses it. The staging memory, kDepth times
// kGathered bytes, is registered with the kernel if the limit of locked memory allows.
std::unique_ptr<Channel> make_uring_channel(int file, char* staging);
// For hunting: transfers end early or interrupted, at random by seed.
std::unique_ptr<Channel> make_faulty_channel(std::unique_ptr<Channel> channel, uint64_t seed);

}  // namespace pykern
