// masked_whiten on a GPU: what the host hands over. Two launches: moments, whose last block merges those of all
// blocks, and the pass that whitens.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// Of the tokens that count: of a block, and in the end what a token x becomes, (x - mean) * scale + shift.
enum WhitenNumber : int { kWhitenCount, kWhitenLow, kWhitenHigh, kWhitenMean, kWhitenSquares, kWhitenNumbers };
enum Whitening : int { kWhiteningMean, kWhiteningScale, kWhiteningShift, kWhiteningNumbers };

struct WhitenParams {
  const void* values;  // float32 or float64, as is the result
  const uint8_t* mask;  // null: all tokens count
  void* result;
  int64_t tokens;
  bool shift_mean;
  double eps;
  int ddof;

  int64_t blocks;                // of the moments
  double* moments;               // [blocks, kWhitenNumbers]
  double* whitening;             // [kWhiteningNumbers]
  unsigned long long* finished;  // zero at first: blocks that are through
};

int64_t whiten_blocks(const WhitenParams& params);
const char* launch_masked_whiten(DataType type, const WhitenParams& params, Stream stream);

}  // namespace pykern
