// Where offloaded bytes lie: one range of addresses [0, extent) that grows.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pykern {

// A range of a block, and the memory that it is written from.
struct Piece {
  int64_t offset;
  int64_t bytes;
  const char* data;

  int64_t end() const { return offset + bytes; }
};

// Calls on disjoint ranges may run at once. Each returns an empty string, or why it failed.
class Medium {
 public:
  virtual ~Medium() = default;
  virtual int64_t granularity() const = 0;
  // Makes [0, extent) usable; what was usable before stays so if it fails.
  virtual std::string grow(int64_t extent) = 0;
  // Writes a block at `offset`. Its pieces don't overlap and are sorted; what lies between them is left as it is, or
  // overwritten with zeros.
  virtual std::string write(int64_t offset, const std::vector<Piece>& pieces) = 0;
  // `target` is aligned to kPage and has room for `bytes` rounded up to kPage.
  virtual std::string read(int64_t offset, void* target, int64_t bytes) = 0;
  // Where the bytes lie, if in memory.
  virtual const char* address(int64_t) const { return nullptr; }
  // "memory"; "file, direct, io_uring", "file, direct, threads" or "file, buffered"; or "file, in memory" for a file
  // system without a disk.
  virtual std::string description() const = 0;
};

constexpr int64_t kPage = 4096;
constexpr int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// What freed bytes hold when hunting: all bits set are NaN in every floating-point type, so whoever still reads them
// shows it.
constexpr char kPoison = '\xff';

struct MediumResult {
  std::unique_ptr<Medium> medium;
  std::string error;
};

// A second arena of ordinary memory, of at most `limit` bytes.
MediumResult make_arena(int64_t limit, int64_t granularity);

// best: io_uring where it works, and else the threads of the engine, as on request.
enum class FileTransfers { best, threads };

struct FileOptions {
  FileTransfers transfers = FileTransfers::best;
  int64_t fault_seed = -1;  // >= 0: transfers end early or interrupted at random
};

// A file in `folder` that has no name any more when this returns.
MediumResult make_spill_file(const std::string& folder, const FileOptions& options);

// "what: text of the error number".
std::string system_error(const std::string& what, int code);

}  // namespace pykern
