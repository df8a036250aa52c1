// optimal_token_baseline on a GPU: what the host hands over. Three launches: the next row of each row's group; the
// sums of each row up to each of its tiles; the baselines of each group and tile, and the advantages.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

constexpr int64_t kBaselineTileSteps = 512;

// Of a row.
struct BaselineRow {
  int64_t next;    // row of the same group, or -1
  int64_t length;  // its unmasked tokens; -1 if one of its values is not finite
};

// Pointers to float32 or float64, all of one kind; null where absent.
struct TokenBaselineParams {
  const void *returns, *logprobs, *sum_p2, *weights;
  const int64_t* ids;
  const uint8_t* mask;
  void* advantages;  // zero at first if by_token
  unsigned long long* left_out;  // [1], zero at first
  int64_t rows, columns, tiles;
  bool by_token, zero_tail, singleton_self;
  double eps;

  BaselineRow* of_rows;   // [rows]
  uint8_t* has_previous;  // [rows], zero at first
  int32_t* columns_of;    // [rows, columns] the column of each unmasked token of a row; by_token only
  double* energy_before;  // [rows, tiles] sums over the steps before a tile
};

inline int64_t baseline_tiles(int64_t columns) { return (columns + kBaselineTileSteps - 1) / kBaselineTileSteps; }

const char* launch_token_baseline(DataType type, const TokenBaselineParams& params, Stream stream);

}  // namespace pykern
