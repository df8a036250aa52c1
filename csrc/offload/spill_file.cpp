#include <fcntl.h>
#include <linux/magic.h>
#include <linux/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>

#include "offload/channel.h"
#include "offload/medium.h"

namespace pykern {
namespace {

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
using AlignedBytes = std::unique_ptr<char, Free>;

AlignedBytes aligned_bytes(int64_t bytes) { return AlignedBytes(static_cast<char*>(std::aligned_alloc(kPage, bytes))); }

// Where direct writes may take memory from: torch aligns to 64 bytes, and most disks take that.
int64_t memory_alignment(int file) {
#if defined(STATX_DIOALIGN) && defined(SYS_statx)
  // By number: the C library's own name for it would ask for a newer library.
  struct statx status;
  std::memset(&status, 0, sizeof(status));
  if (syscall(SYS_statx, file, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) && status.stx_dio_mem_align > 0 && status.stx_dio_offset_align <= kPage) {
    return status.stx_dio_mem_align;
  }
#else
  (void)file;
#endif
  return kPage;
}

class SpillFile : public Medium {
 public:
  SpillFile(int file, std::string folder, FileOptions options)
      : file_(file), folder_(std::move(folder)), options_(options) {}

  ~SpillFile() override {
    lanes_.clear();
    close(file_);
  }

  int64_t granularity() const override { return kPage; }

  std::string grow(int64_t extent) override {
    // Asked first: some file systems fill the disk up before they notice that it is not enough.
    struct statvfs system;
    const bool fits = fstatvfs(file_, &system) != 0 || system.f_blocks == 0 ||
                      static_cast<uint64_t>(extent - size_) / system.f_frsize <= system.f_bavail;
    const int code = fits ? allocate(extent) : ENOSPC;
    if (code != 0) {
      return system_error("cannot preallocate " + std::to_string(extent) + " bytes of the spill file in " + folder_,
                          code);
    }
    // The C library's zeros come in sizes that direct I/O would refuse.
    if (size_ == 0 && preallocates_) probe_direct();
    size_ = extent;
    return "";
  }

  std::string write(int64_t offset, const std::vector<Piece>& pieces) override {
    return direct_ ? run(true, offset, DirectWrites(pieces, alignment_)) : run(true, offset, PlainWrites(pieces));
  }

  std::string read(int64_t offset, void* target, int64_t bytes) override {
    return run(false, offset, Reads(static_cast<char*>(target), direct_ ? whole_pages(bytes) : bytes));
  }

  std::string description() const override {
    struct statfs system;
    if (fstatfs(file_, &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC)) {
      return "file, in memory";
    }
    if (!direct_) return "file, buffered";
    return uring_ ? "file, direct, io_uring" : "file, direct, threads";
  }

 private:
  // 0, or the error number. Where the file system can't, the C library writes zeros instead.
  int allocate(int64_t extent) {
    int code = EINTR;
    while (preallocates_ && code == EINTR) {
      code = fallocate(file_, 0, size_, extent - size_) == 0 ? 0 : errno;
      preallocates_ = code != EOPNOTSUPP && code != ENOSYS;
    }
    if (preallocates_) return code;
    do {
      code = posix_fallocate(file_, size_, extent - size_);
    } while (code == EINTR);
    return code;
  }

  // What one block needs on its way: a channel, and memory to gather in.
  struct Lane {
    AlignedBytes staging;
    std::unique_ptr<Channel> channel;
  };

  // Runs the requests of one block, several at a time. Those in flight end before this returns,
  // also after an error.
  template <class Requests>
  std::string run(bool write, int64_t base, Requests requests) {
    std::unique_ptr<Lane> lane = take_lane();
    if (!lane) return "no memory to gather " + std::to_string(kDepth * kGathered) + " bytes for the spill file";
    Channel::Transfer transfers[kDepth];
    int in_flight = 0;
    std::string error;
    const auto start_next = [&](int number) {
      Request request;
      if (!error.empty() || !requests.next(lane->staging.get() + number * kGathered, request)) return;
      transfers[number] = {write, base + request.offset, request.data, request.bytes};
      ++in_flight;
      lane->channel->start(number, transfers[number]);
    };
    for (int number = 0; number < kDepth; ++number) start_next(number);
    while (in_flight > 0) {
      const auto [number, result] = lane->channel->wait();
      Channel::Transfer& transfer = transfers[number];
      int64_t moved = 0;
      if (result != -EINTR && result != -EAGAIN) {
        moved = result;
        if (result <= 0) {
          error = failed(transfer, result);
        } else if (direct_ && result < transfer.bytes) {
          // A direct transfer may stop short, but only at a block; going on from anywhere else is refused.
          moved = result / kPage * kPage;
          if (moved == 0) error = failed(transfer, -EIO);
        }
      }
      if (error.empty() && moved < transfer.bytes) {
        transfer.offset += moved;
        transfer.data += moved;
        transfer.bytes -= moved;
        lane->channel->start(number, transfer);
        continue;
      }
      --in_flight;
      start_next(number);
    }
    give_lane(std::move(lane));
    return error;
  }

  std::string failed(const Channel::Transfer& transfer, int64_t result) const {
    const std::string what = std::string(transfer.write ? "writing " : "reading ") + std::to_string(transfer.bytes) +
                             " bytes at " + std::to_string(transfer.offset) + " of the spill file in " + folder_;
    if (result == 0 && !transfer.write) return what + ": the file ends there";
    return system_error(what, result == 0 ? EIO : static_cast<int>(-result));
  }

  std::unique_ptr<Lane> take_lane() {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (!lanes_.empty()) {
        std::unique_ptr<Lane> lane = std::move(lanes_.back());
        lanes_.pop_back();
        return lane;
      }
    }
    auto lane = std::make_unique<Lane>();
    lane->staging = aligned_bytes(kDepth * kGathered);
    if (!lane->staging) return nullptr;
    if (uring_) lane->channel = make_uring_channel(file_, lane->staging.get());
    if (!lane->channel) lane->channel = make_blocking_channel(file_);
    add_faults(*lane);
    return lane;
  }

  void give_lane(std::unique_ptr<Lane> lane) {
    const std::lock_guard<std::mutex> guard(mutex_);
    lanes_.push_back(std::move(lane));
  }

  void add_faults(Lane& lane) {
    if (options_.fault_seed < 0) return;
    const std::lock_guard<std::mutex> guard(mutex_);
    lane.channel = make_faulty_channel(std::move(lane.channel), options_.fault_seed * 1000003 + made_lanes_++);
  }

  // Direct I/O keeps spilled bytes out of the page cache, which would only be memory again. Some
  // file systems refuse it at the first transfer instead of here, hence the trial.
  void probe_direct() {
    const int flags = fcntl(file_, F_GETFL);
    if (fcntl(file_, F_SETFL, flags | O_DIRECT) != 0) return;
    const AlignedBytes pages = aligned_bytes(2 * kPage);
    if (!pages) return;
    std::memset(pages.get(), 0, 2 * kPage);
    const std::unique_ptr<Channel> blocking = make_blocking_channel(file_);
    direct_ = moves(*blocking, true, pages.get()) && moves(*blocking, false, pages.get());
    if (!direct_) {
      fcntl(file_, F_SETFL, flags);
      return;
    }
    const int64_t told = memory_alignment(file_);
    alignment_ = told < kPage && moves(*blocking, true, pages.get() + told) ? told : kPage;
    if (options_.transfers == FileTransfers::threads) return;
    // A container refuses the ring, or a kernel has it and refuses its operations.
    auto lane = std::make_unique<Lane>();
    lane->staging = aligned_bytes(kDepth * kGathered);
    if (lane->staging) lane->channel = make_uring_channel(file_, lane->staging.get());
    uring_ = lane->channel && moves(*lane->channel, true, pages.get()) && moves(*lane->channel, false, pages.get());
    if (!uring_) return;
    add_faults(*lane);
    give_lane(std::move(lane));
  }

  static bool moves(Channel& channel, bool write, char* page) {
    channel.start(0, {write, 0, page, kPage});
    return channel.wait().result == kPage;
  }

  const int file_;
  const std::string folder_;
  const FileOptions options_;
  int64_t size_ = 0, alignment_ = kPage;
  bool direct_ = false, uring_ = false, preallocates_ = true;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  int64_t made_lanes_ = 0;
};

int open_without_name(const std::string& folder) {
  const int file = open(folder.c_str(), O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC, 0600);
  if (file >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT && errno != EINVAL)) return file;
  std::string name = folder + "/pykern-spill-XXXXXX";
  const int named = mkostemp(name.data(), O_CLOEXEC);
  if (named >= 0) unlink(name.c_str());
  return named;
}

}  // namespace

MediumResult make_spill_file(const std::string& folder, const FileOptions& options) {
  const int file = open_without_name(folder);
  if (file < 0) return {nullptr, system_error("cannot create a file in " + folder, errno)};
  return {std::make_unique<SpillFile>(file, folder, options), ""};
}

}  // namespace pykern
