#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "offload/medium.h"

namespace pykern {

std::string system_error(const std::string& what, int code) {
  return what + ": " + std::generic_category().message(code);
}

namespace {

// Address space for the whole limit is reserved at once, so that slots never move; memory is
// committed as the arena grows.
class Arena : public Medium {
 public:
  Arena(char* base, int64_t limit, int64_t granularity) : base_(base), limit_(limit), granularity_(granularity) {}
  ~Arena() override { munmap(base_, limit_); }

  int64_t granularity() const override { return granularity_; }
  const char* address(int64_t offset) const override { return base_ + offset; }

  std::string grow(int64_t extent) override {
    if (extent > limit_) return "the arena's " + std::to_string(limit_) + " bytes are taken";
    if (mprotect(base_, extent, PROT_READ | PROT_WRITE) != 0) {
      return system_error("no memory for an arena of " + std::to_string(extent) + " bytes", errno);
    }
    return "";
  }

  std::string write(int64_t offset, const std::vector<Piece>& pieces) override {
    for (const Piece& piece : pieces) std::memcpy(base_ + offset + piece.offset, piece.data, piece.bytes);
    return "";
  }

  std::string read(int64_t offset, void* target, int64_t bytes) override {
    std::memcpy(target, base_ + offset, bytes);
    return "";
  }

  std::string description() const override { return "memory"; }

 private:
  char* const base_;
  const int64_t limit_, granularity_;
};

}  // namespace

MediumResult make_arena(int64_t limit, int64_t granularity) {
  limit = whole_pages(limit);
  void* base = mmap(nullptr, limit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return {nullptr, system_error("cannot reserve " + std::to_string(limit) + " bytes of address space", errno)};
  }
  return {std::make_unique<Arena>(static_cast<char*>(base), limit, granularity), ""};
}

}  // namespace pykern
