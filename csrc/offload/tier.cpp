#include "offload/tier.h"

#include <algorithm>

namespace pykern {

Tier::Tier(std::unique_ptr<Medium> medium, int64_t limit, int64_t growth)
    : medium_(std::move(medium)), limit_(limit), growth_(growth), slots_(medium_->granularity()) {}

std::string Tier::lay_out(const std::vector<int64_t>& slot_bytes, std::vector<int64_t>& offsets) {
  int64_t extent = 0;
  for (const int64_t bytes : slot_bytes) {
    offsets.push_back(extent);
    extent += slots_.rounded(bytes);
  }
  if (extent == 0) return "";
  if (limit_ >= 0 && extent > limit_) {
    return "the slots take " + std::to_string(extent) + " bytes, more than the capacity of " + std::to_string(limit_);
  }
  const std::string error = medium_->grow(extent);
  if (error.empty()) slots_.set_aside(extent);
  return error;
}

std::string Tier::preallocate(int64_t bytes) {
  const int64_t extent = slots_.rounded(bytes);
  if (extent <= slots_.extent()) return "";
  const std::string error = medium_->grow(extent);
  if (error.empty()) slots_.grow(extent);
  return error;
}

int64_t Tier::take(int64_t bytes, std::string& error) {
  const int64_t offset = slots_.take(bytes);
  if (offset >= 0 || !grow_for(bytes, error)) return offset;
  return slots_.take(bytes);
}

bool Tier::grow_for(int64_t bytes, std::string& error) {
  const int64_t needed = slots_.extent_for(bytes);
  if (limit_ >= 0 && needed > limit_) return false;
  int64_t wanted = std::max(needed, slots_.extent() + growth_);
  if (limit_ >= 0) wanted = std::min(wanted, limit_);
  std::string why = medium_->grow(wanted);
  if (!why.empty() && needed < wanted) {
    wanted = needed;
    why = medium_->grow(wanted);
  }
  if (!why.empty()) {
    error = why;
    return false;
  }
  slots_.grow(wanted);
  ++growths_;
  return true;
}

}  // namespace pykern
