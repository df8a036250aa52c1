#include "offload/requests.h"

#include <algorithm>
#include <cstring>

namespace pykern {

namespace {

// Fewer bytes than this are cheaper copied than given a transfer of their own.
constexpr int64_t kWorthATransfer = 64 << 10;

// The bytes [begin, begin + bytes) of a block, with zeros where no piece lies.
void gather(const std::vector<Piece>& pieces, size_t first_piece, int64_t begin, int64_t bytes, char* target) {
  const int64_t end = begin + bytes;
  int64_t filled = begin;
  for (size_t index = first_piece; index < pieces.size() && pieces[index].offset < end; ++index) {
    const Piece& piece = pieces[index];
    const int64_t first = std::max(piece.offset, begin), last = std::min(piece.end(), end);
    if (first >= last) continue;
    std::memset(target + (filled - begin), 0, first - filled);
    std::memcpy(target + (first - begin), piece.data + (first - piece.offset), last - first);
    filled = last;
  }
  std::memset(target + (filled - begin), 0, end - filled);
}

}  // namespace

bool DirectWrites::next(char* staging, Request& request) {
  while (current_ < pieces_.size() && pieces_[current_].end() <= position_) ++current_;
  if (current_ == pieces_.size()) return false;
  position_ = std::max(position_, pieces_[current_].offset / kPage * kPage);
  const Piece& piece = pieces_[current_];
  const int64_t direct = direct_bytes(piece, position_);
  if (direct >= kWorthATransfer) {
    char* data = const_cast<char*>(piece.data) + (position_ - piece.offset);
    request = {position_, data, std::min(direct, kRequest)};
  } else {
    request = {position_, staging, end_of_gathering(position_ + kGathered) - position_};
    gather(pieces_, current_, position_, request.bytes, staging);
  }
  position_ += request.bytes;
  return true;
}

int64_t DirectWrites::direct_bytes(const Piece& piece, int64_t begin) const {
  if (begin < piece.offset || begin >= piece.end()) return 0;
  if (reinterpret_cast<uintptr_t>(piece.data + (begin - piece.offset)) % alignment_ != 0) return 0;
  return (piece.end() - begin) / kPage * kPage;
}

int64_t DirectWrites::end_of_gathering(int64_t end) const {
  int64_t covered = position_;
  for (size_t index = current_; index < pieces_.size() && pieces_[index].offset < end; ++index) {
    const Piece& piece = pieces_[index];
    if (covered > position_ && piece.offset >= covered + kPage) break;
    const int64_t begin = std::max(whole_pages(piece.offset), position_);
    if (begin > position_ && begin < end && direct_bytes(piece, begin) >= kWorthATransfer) return begin;
    covered = whole_pages(piece.end());
  }
  return std::min(covered, end);
}

bool PlainWrites::next(char*, Request& request) {
  if (current_ == pieces_.size()) return false;
  const Piece& piece = pieces_[current_];
  request = {piece.offset + done_, const_cast<char*>(piece.data) + done_, std::min(piece.bytes - done_, kRequest)};
  done_ += request.bytes;
  if (done_ == piece.bytes) {
    ++current_;
    done_ = 0;
  }
  return true;
}

bool Reads::next(char*, Request& request) {
  if (done_ == bytes_) return false;
  request = {done_, target_ + done_, std::min(bytes_ - done_, kRequest)};
  done_ += request.bytes;
  return true;
}

}  // namespace pykern
