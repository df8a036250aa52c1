#include "offload/slots.h"

#include <algorithm>
#include <iterator>

namespace pykern {

int64_t Slots::rounded(int64_t bytes) const {
  return std::max<int64_t>(1, (bytes + granularity_ - 1) / granularity_) * granularity_;
}

int64_t Slots::take(int64_t bytes) {
  const int64_t size = rounded(bytes);
  const auto found = free_by_size_.lower_bound({size, 0});
  if (found == free_by_size_.end()) return -1;
  const auto [free_size, offset] = *found;
  erase_free(free_by_offset_.find(offset));
  if (free_size > size) insert_free(offset + size, free_size - size);
  account(size, true);
  return offset;
}

void Slots::account(int64_t bytes, bool used) {
  used_ += used ? bytes : -bytes;
  count_ += used ? 1 : -1;
  peak_ = std::max(peak_, used_);
  peak_count_ = std::max(peak_count_, count_);
}

void Slots::give(int64_t offset, int64_t bytes) {
  const int64_t size = rounded(bytes);
  account(size, false);
  insert_free(offset, size);
}

int64_t Slots::extent_for(int64_t bytes) const {
  const int64_t size = rounded(bytes);
  if (!free_by_offset_.empty()) {
    const auto [offset, free_size] = *std::prev(free_by_offset_.end());
    if (offset + free_size == extent_) return offset + size;
  }
  return extent_ + size;
}

void Slots::grow(int64_t extent) {
  insert_free(extent_, extent - extent_);
  extent_ = extent;
}

void Slots::reset_peaks() {
  peak_ = used_;
  peak_count_ = count_;
}

void Slots::insert_free(int64_t offset, int64_t size) {
  const auto next = free_by_offset_.lower_bound(offset);
  if (next != free_by_offset_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      size += previous->second;
      erase_free(previous);
    }
  }
  const auto after = free_by_offset_.find(offset + size);
  if (after != free_by_offset_.end()) {
    size += after->second;
    erase_free(after);
  }
  free_by_offset_.emplace(offset, size);
  free_by_size_.emplace(size, offset);
}

void Slots::erase_free(std::map<int64_t, int64_t>::iterator range) {
  free_by_size_.erase({range->second, range->first});
  free_by_offset_.erase(range);
}

}  // namespace pykern
