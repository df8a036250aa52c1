// How long copies take over a link that this machine does not have.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <mutex>

namespace pykern {

// Copies in one direction follow each other; with one link for both directions, all do. Each takes
// latency + bytes / bandwidth. The CPU is not needed meanwhile: a copy waits for its end.
class Link {
 public:
  using Clock = std::chrono::steady_clock;
  struct Rates {
    double out = 0, in = 0;  // bytes per second; 0: no limit
    double latency = 0;      // seconds
    int64_t directions = 2;
  };

  explicit Link(const Rates& rates) : rates_(rates) {}

  bool is_modelled() const { return rates_.out > 0 || rates_.in > 0 || rates_.latency > 0; }
  bool has_two_directions() const { return is_modelled() && rates_.directions == 2; }

  // When a copy that starts now will have ended; long ago without a model.
  Clock::time_point book(bool in, int64_t bytes) {
    if (!is_modelled()) return {};
    const double rate = in ? rates_.in : rates_.out;
    const double seconds = rates_.latency + (rate > 0 ? static_cast<double>(bytes) / rate : 0);
    const std::lock_guard<std::mutex> guard(mutex_);
    Clock::time_point& free = free_[in && rates_.directions == 2];
    free = std::max(free, Clock::now()) +
           std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    return free;
  }

 private:
  const Rates rates_;
  std::mutex mutex_;
  Clock::time_point free_[2];
};

}  // namespace pykern
