// discounted_scan on a GPU: what the host hands over.
//
// A sequence is cut into parts, from its end; a part is the work of a block. Parts are handed out so that whoever
// waits for the part to the right waits for a block that already runs.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// Pointers to float32 or float64, all of one kind; null where absent.
struct DiscountedScanParams {
  const void *rewards, *values;
  const uint8_t* mask;
  const int64_t* cu_seqlens;  // [sequences + 1]; null: `columns` tokens each
  const double* lambdas;      // [sequences]; null: `lambda`
  void *advantages, *returns;
  int64_t tokens, sequences, columns;
  double gamma, lambda;
  bool decay;  // masked tokens count as steps

  // Whose sizes depend on what stands above.
  int64_t parts;                 // of each sequence
  double* passed;                // [sequences, parts] the advantage at a part's beginning; for several parts
  unsigned long long* progress;  // [1 + sequences * parts], zero at first: parts handed out, and which have passed
};

int64_t discounted_scan_parts(const DiscountedScanParams& params);
const char* launch_discounted_scan(DataType type, const DiscountedScanParams& params, Stream stream);

}  // namespace pykern
