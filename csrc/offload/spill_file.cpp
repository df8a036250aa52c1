#include <fcntl.h>
#include <linux/magic.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "offload/medium.h"

namespace pykern {
namespace {

// Bytes of one request, and of the aligned copy that a direct write goes through.
constexpr int64_t kRequest = int64_t{4} << 20;

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
using AlignedBytes = std::unique_ptr<char, Free>;

AlignedBytes aligned_bytes(int64_t bytes) { return AlignedBytes(static_cast<char*>(std::aligned_alloc(kPage, bytes))); }

int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// The bytes [begin, begin + bytes) of a block, with zeros where no piece lies.
void compose(const std::vector<Piece>& pieces, int64_t begin, int64_t bytes, char* target) {
  const int64_t end = begin + bytes;
  int64_t filled = begin;
  for (const Piece& piece : pieces) {
    const int64_t first = std::max(piece.offset, begin), last = std::min(piece.end(), end);
    if (first >= last) continue;
    std::memset(target + (filled - begin), 0, first - filled);
    std::memcpy(target + (first - begin), piece.data + (first - piece.offset), last - first);
    filled = last;
  }
  std::memset(target + (filled - begin), 0, end - filled);
}

class SpillFile : public Medium {
 public:
  SpillFile(int file, std::string folder) : file_(file), folder_(std::move(folder)) {}
  ~SpillFile() override { close(file_); }

  int64_t granularity() const override { return kPage; }

  std::string grow(int64_t extent) override {
    // Asked first: some file systems fill the disk up before they notice that it is not enough.
    struct statfs system;
    if (fstatfs(file_, &system) == 0 && system.f_blocks > 0 &&
        static_cast<uint64_t>(extent - size_) / system.f_bsize > system.f_bavail) {
      return system_error("cannot preallocate " + std::to_string(extent) + " bytes", ENOSPC);
    }
    int code;
    do {
      code = fallocate(file_, 0, size_, extent - size_) == 0 ? 0 : errno;
    } while (code == EINTR);
    if (code == EOPNOTSUPP || code == ENOSYS) {
      // The C library writes zeros instead, in sizes that direct I/O would refuse.
      direct_ = false;
      fcntl(file_, F_SETFL, fcntl(file_, F_GETFL) & ~O_DIRECT);
      preallocates_ = false;
      code = posix_fallocate(file_, size_, extent - size_);
    }
    if (code != 0) return system_error("cannot preallocate " + std::to_string(extent) + " bytes", code);
    size_ = extent;
    if (!probed_ && preallocates_) probe_direct();
    probed_ = true;
    return "";
  }

  std::string write(int64_t offset, const std::vector<Piece>& pieces, int64_t bytes) override {
    if (!direct_) {
      for (const Piece& piece : pieces) {
        const std::string error = write_all(offset + piece.offset, piece.data, piece.bytes);
        if (!error.empty()) return error;
      }
      return "";
    }
    thread_local AlignedBytes staging;
    if (!staging) staging = aligned_bytes(kRequest);
    if (!staging) return "no memory for a write of " + std::to_string(kRequest) + " bytes";
    for (int64_t done = 0; done < bytes; done += kRequest) {
      const int64_t part = std::min(kRequest, bytes - done);
      compose(pieces, done, whole_pages(part), staging.get());
      const std::string error = write_all(offset + done, staging.get(), whole_pages(part));
      if (!error.empty()) return error;
    }
    return "";
  }

  std::string read(int64_t offset, void* target, int64_t bytes) override {
    char* to = static_cast<char*>(target);
    int64_t left = direct_ ? whole_pages(bytes) : bytes;
    while (left > 0) {
      const ssize_t got = pread(file_, to, std::min(left, kRequest), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) {
        const std::string what = "reading " + std::to_string(left) + " bytes at " + std::to_string(offset) +
                                 " of the spill file in " + folder_;
        return got < 0 ? system_error(what, errno) : what + ": the file ends there";
      }
      // A direct transfer may stop short, but only at a block; going on from anywhere else is refused.
      const int64_t step = direct_ && got < left ? got / kPage * kPage : got;
      if (step == 0) return "reading the spill file in " + folder_ + ": the file ends inside of a block";
      to += step;
      offset += step;
      left -= step;
    }
    return "";
  }

  std::string description() const override {
    struct statfs system;
    if (fstatfs(file_, &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC)) {
      return "file, in memory";
    }
    return direct_ ? "file, direct" : "file, buffered";
  }

 private:
  std::string write_all(int64_t offset, const char* from, int64_t left) {
    while (left > 0) {
      const ssize_t put = pwrite(file_, from, std::min(left, kRequest), offset);
      if (put < 0 && errno == EINTR) continue;
      if (put <= 0) {
        return system_error("writing " + std::to_string(left) + " bytes at " + std::to_string(offset) +
                                " of the spill file in " + folder_,
                            put < 0 ? errno : EIO);
      }
      const int64_t step = direct_ && put < left ? put / kPage * kPage : put;
      if (step == 0) return "writing the spill file in " + folder_ + ": a direct write stopped inside of a block";
      from += step;
      offset += step;
      left -= step;
    }
    return "";
  }

  // Direct I/O keeps spilled bytes out of the page cache, which would only be memory again. Some
  // file systems refuse it at the first transfer instead of here, hence the trial.
  void probe_direct() {
    const int flags = fcntl(file_, F_GETFL);
    const AlignedBytes page = aligned_bytes(kPage);
    if (!page || fcntl(file_, F_SETFL, flags | O_DIRECT) != 0) return;
    std::memset(page.get(), 0, kPage);
    direct_ = pwrite(file_, page.get(), kPage, 0) == kPage && pread(file_, page.get(), kPage, 0) == kPage;
    if (!direct_) fcntl(file_, F_SETFL, flags);
  }

  const int file_;
  const std::string folder_;
  int64_t size_ = 0;
  bool direct_ = false, probed_ = false, preallocates_ = true;
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

MediumResult make_spill_file(const std::string& folder) {
  const int file = open_without_name(folder);
  if (file < 0) return {nullptr, system_error("cannot create a file", errno)};
  return {std::make_unique<SpillFile>(file, folder), ""};
}

}  // namespace pykern
