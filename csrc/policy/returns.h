// Discounted returns and generalised advantages: what the host hands to the kernels of one instruction-set level.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace pykern {

// A run of tokens of one sequence, and what the scan knows at a place between two tokens, coming from the right.
struct ScanSegment {
  int64_t begin, end;
  double decay;           // gamma lambda
  double next_value;      // V of the next token to the right that counts
  double next_advantage;  // its A
  double factor;          // what a change of next_advantage at the segment's end counts at its beginning
};

// Pointers to float32 or float64, all of one kind; null where absent.
struct ScanParams {
  const void* rewards;
  const void* values;
  const uint8_t* mask;
  void* advantages;
  void* returns;
  double gamma;
  bool decay;  // masked tokens count as steps
  ScanSegment* segments;
};

// Runs over the segments of these indices and leaves in each what is known at its beginning. Results are written, or
// only the segment's factor is found.
PYKERN_SIMD_FUNCTION(void, discounted_scan_f32,
                     (const ScanParams& params, const int64_t* indices, int64_t count, bool write))
PYKERN_SIMD_FUNCTION(void, discounted_scan_f64,
                     (const ScanParams& params, const int64_t* indices, int64_t count, bool write))

}  // namespace pykern
