// io_uring without its library: three system calls, and two rings in memory shared with the kernel.
#include "offload/channel.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif

// The first headers that know plain reads and writes; the first kernels did not have them either.
#if defined(IORING_FEAT_RW_CUR_POS)

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace pykern {
namespace {

class UringChannel : public Channel {
 public:
  static std::unique_ptr<Channel> open(int file, char* staging) {
    io_uring_params params;
    std::memset(&params, 0, sizeof(params));
    const int ring = static_cast<int>(syscall(SYS_io_uring_setup, kDepth, &params));
    if (ring < 0) return nullptr;
    auto channel = std::unique_ptr<UringChannel>(new UringChannel(ring, file, staging));
    if (!channel->map(params)) return nullptr;
    return channel;
  }

  ~UringChannel() override {
    if (entries_) munmap(entries_, entries_bytes_);
    if (rings_) munmap(rings_, rings_bytes_);
    close(ring_);
  }

  void start(int number, const Transfer& transfer) override {
    const unsigned tail = *submission_tail_;
    const unsigned index = tail & *submission_mask_;
    io_uring_sqe& entry = entries_[index];
    std::memset(&entry, 0, sizeof(entry));
    const bool fixed = registered_ && transfer.data >= staging_ && transfer.data < staging_ + kDepth * kGathered;
    entry.opcode = transfer.write ? (fixed ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE) : IORING_OP_READ;
    entry.fd = file_;
    entry.off = static_cast<uint64_t>(transfer.offset);
    entry.addr = reinterpret_cast<uint64_t>(transfer.data);
    entry.len = static_cast<uint32_t>(transfer.bytes);
    entry.user_data = static_cast<uint64_t>(number);
    submission_order_[index] = index;
    __atomic_store_n(submission_tail_, tail + 1, __ATOMIC_RELEASE);
    ++unsubmitted_;
    // At once, so that the device works while the next transfer is being prepared.
    enter(0);
  }

  Ended wait() override {
    for (;;) {
      const unsigned head = *completion_head_;
      if (head != __atomic_load_n(completion_tail_, __ATOMIC_ACQUIRE)) {
        const io_uring_cqe& completion = completions_[head & *completion_mask_];
        const Ended ended{static_cast<int>(completion.user_data), completion.res};
        __atomic_store_n(completion_head_, head + 1, __ATOMIC_RELEASE);
        return ended;
      }
      const int code = enter(1);
      if (code == 0 || code == EINTR) continue;
      if (code != EAGAIN && code != EBUSY && unsubmitted_ > 0) {
        // Nothing was taken: the last entry is taken back.
        const unsigned tail = *submission_tail_ - 1;
        __atomic_store_n(submission_tail_, tail, __ATOMIC_RELEASE);
        --unsubmitted_;
        return {static_cast<int>(entries_[tail & *submission_mask_].user_data), -code};
      }
      sched_yield();
    }
  }

 private:
  UringChannel(int ring, int file, char* staging) : ring_(ring), file_(file), staging_(staging) {}

  bool map(const io_uring_params& params) {
    if (!(params.features & IORING_FEAT_SINGLE_MMAP)) return false;
    rings_bytes_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                    params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    const auto mapped = [&](size_t bytes, off_t offset) -> void* {
      void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_, offset);
      return memory == MAP_FAILED ? nullptr : memory;
    };
    rings_ = static_cast<char*>(mapped(rings_bytes_, IORING_OFF_SQ_RING));
    entries_ = static_cast<io_uring_sqe*>(mapped(entries_bytes_, IORING_OFF_SQES));
    if (!rings_ || !entries_) return false;
    const auto at = [&](unsigned offset) { return reinterpret_cast<unsigned*>(rings_ + offset); };
    submission_tail_ = at(params.sq_off.tail);
    submission_mask_ = at(params.sq_off.ring_mask);
    submission_order_ = at(params.sq_off.array);
    completion_head_ = at(params.cq_off.head);
    completion_tail_ = at(params.cq_off.tail);
    completion_mask_ = at(params.cq_off.ring_mask);
    completions_ = reinterpret_cast<io_uring_cqe*>(rings_ + params.cq_off.cqes);
    const iovec staging{staging_, static_cast<size_t>(kDepth * kGathered)};
    registered_ = syscall(SYS_io_uring_register, ring_, IORING_REGISTER_BUFFERS, &staging, 1) == 0;
    return true;
  }

  // Hands over what was not yet, waits for `least` ends; 0, or the error number.
  int enter(unsigned least) {
    const long taken = syscall(SYS_io_uring_enter, ring_, unsubmitted_, least, least ? IORING_ENTER_GETEVENTS : 0u,
                               nullptr, static_cast<size_t>(0));
    if (taken < 0) return errno;
    unsubmitted_ -= static_cast<unsigned>(taken);
    return 0;
  }

  const int ring_, file_;
  char* const staging_;
  bool registered_ = false;
  unsigned unsubmitted_ = 0;
  char* rings_ = nullptr;
  io_uring_sqe* entries_ = nullptr;
  size_t rings_bytes_ = 0, entries_bytes_ = 0;
  unsigned *submission_tail_ = nullptr, *submission_mask_ = nullptr, *submission_order_ = nullptr;
  unsigned *completion_head_ = nullptr, *completion_tail_ = nullptr, *completion_mask_ = nullptr;
  io_uring_cqe* completions_ = nullptr;
};

}  // namespace

std::unique_ptr<Channel> make_uring_channel(int file, char* staging) { return UringChannel::open(file, staging); }

}  // namespace pykern

#else

namespace pykern {

std::unique_ptr<Channel> make_uring_channel(int, char*) { return nullptr; }

}  // namespace pykern

#endif
