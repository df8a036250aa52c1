// How a block is cut into the transfers that a file takes.
#pragma once

#include <cstdint>
#include <vector>

#include "offload/medium.h"

namespace pykern {

// Most bytes of one transfer, of one that is gathered first, and transfers in flight for one block.
constexpr int64_t kRequest = int64_t{4} << 20;
constexpr int64_t kGathered = int64_t{1} << 20;
constexpr int kDepth = 4;

// Of `bytes` at `offset` of the block, from or into `data`.
struct Request {
  int64_t offset = 0;
  char* data = nullptr;
  int64_t bytes = 0;
};

// Direct writes take whole pages only, from memory at multiples of `alignment`. Where a piece
// covers whole pages and lies so, they are written from the piece itself; what is left, the ends of
// pieces and pieces that lie otherwise, is gathered. Pages that no piece touches are left out.
class DirectWrites {
 public:
  DirectWrites(const std::vector<Piece>& pieces, int64_t alignment) : pieces_(pieces), alignment_(alignment) {}

  // False at the end. What must be gathered is gathered in `staging`, of kGathered bytes.
  bool next(char* staging, Request& request);

 private:
  // Whole pages from `begin` on that can be written from the piece itself.
  int64_t direct_bytes(const Piece& piece, int64_t begin) const;
  // Where, after position_ and before `end`, gathering can stop.
  int64_t end_of_gathering(int64_t end) const;

  const std::vector<Piece>& pieces_;
  const int64_t alignment_;
  size_t current_ = 0;
  int64_t position_ = 0;
};

// Any other file takes the pieces as they are.
class PlainWrites {
 public:
  explicit PlainWrites(const std::vector<Piece>& pieces) : pieces_(pieces) {}
  bool next(char* staging, Request& request);

 private:
  const std::vector<Piece>& pieces_;
  size_t current_ = 0;
  int64_t done_ = 0;
};

// The whole block into one buffer.
class Reads {
 public:
  Reads(char* target, int64_t bytes) : target_(target), bytes_(bytes) {}
  bool next(char* staging, Request& request);

 private:
  char* const target_;
  const int64_t bytes_;
  int64_t done_ = 0;
};

}  // namespace pykern
