// Which byte ranges of an arena or a file are free.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>

namespace pykern {

// Best-fit allocation over one growing range of addresses; neighbouring free ranges merge. A step
// that asks for the same sizes in the same order as the one before finds the same slots again.
class Slots {
 public:
  explicit Slots(int64_t granularity) : granularity_(granularity) {}

  // Ranges that somebody else hands out, below those of take(): their number and bytes are only
  // counted here. Called before the first grow().
  void set_aside(int64_t extent) { extent_ = extent; }
  void account(int64_t bytes, bool used);

  int64_t granularity() const { return granularity_; }
  int64_t extent() const { return extent_; }
  int64_t used_bytes() const { return used_; }
  int64_t peak_bytes() const { return peak_; }
  int64_t count() const { return count_; }
  int64_t peak_count() const { return peak_count_; }

  // What a request really takes: whole granules, at least one.
  int64_t rounded(int64_t bytes) const;
  // The offset of a free range, or -1.
  int64_t take(int64_t bytes);
  void give(int64_t offset, int64_t bytes);
  // The extent at which a request that take() refused would fit.
  int64_t extent_for(int64_t bytes) const;
  void grow(int64_t extent);
  void reset_peaks();

 private:
  void insert_free(int64_t offset, int64_t size);
  void erase_free(std::map<int64_t, int64_t>::iterator range);

  const int64_t granularity_;
  int64_t extent_ = 0, used_ = 0, peak_ = 0, count_ = 0, peak_count_ = 0;
  std::map<int64_t, int64_t> free_by_offset_;
  std::set<std::pair<int64_t, int64_t>> free_by_size_;
};

}  // namespace pykern
