// One medium and who has which part of it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "offload/medium.h"
#include "offload/slots.h"

namespace pykern {

// Planned slots come first, and are handed out by whoever planned them; the rest is handed out here.
class Tier {
 public:
  // limit: the largest extent, or -1: as far as the medium grows; it grows by at least `growth`.
  Tier(std::unique_ptr<Medium> medium, int64_t limit, int64_t growth);

  // Once, first: where the planned slots begin. An empty string, or why there is no room for them.
  std::string lay_out(const std::vector<int64_t>& slot_bytes, std::vector<int64_t>& offsets);
  // Makes room for `bytes` in all now.
  std::string preallocate(int64_t bytes);
  // An offset, or -1: it is full, or could not grow, which `error` then tells.
  int64_t take(int64_t bytes, std::string& error);
  void give(int64_t offset, int64_t bytes) { slots_.give(offset, bytes); }

  Medium& medium() { return *medium_; }
  Slots& slots() { return slots_; }
  int64_t limit() const { return limit_; }
  int64_t growths() const { return growths_; }
  // Writing has failed: nothing more is written, what was written can still be read.
  bool failed = false;

 private:
  bool grow_for(int64_t bytes, std::string& error);

  const std::unique_ptr<Medium> medium_;
  const int64_t limit_, growth_;
  Slots slots_;
  int64_t growths_ = 0;
};

}  // namespace pykern
