// Log-probability, entropy and sum of squared probabilities of one token per row of logits.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// What forward and backward share. A row's place follows from its number: the leading dimensions of the
// logits, neighbours of matching strides merged, the last one moving fastest.
//
// A row of negative target is not read. Targets past the vocabulary, which only a synchronisation could
// refuse, are not read either: the row's log-probability, and its gradient, become NaN.
//
// Results are double where `type` is f64 and float otherwise.
struct TokenLogprobsRows {
  static constexpr int kDimensions = 4;
  DataType type;
  int64_t rows, vocabulary;
  const void* logits;
  int dimensions;
  uint32_t size[kDimensions];
  int64_t stride[kDimensions];
  const int64_t* targets;
  const double* row_temperature;  // null: all rows have `inverse_temperature`
  double inverse_temperature;
};

// `statistics` is [rows, 2]: the largest logit, and the logarithm of sum(exp((logit - largest) / T)).
// `entropy` and `sum_p2` may be null.
struct TokenLogprobsParams {
  TokenLogprobsRows rows;
  void *logprobs, *entropy, *sum_p2, *statistics;
};

// A gradient may be null. `entropy` is read where `grad_entropy` is given, likewise `sum_p2`.
// In place, `grad_logits` is the logits; else it is contiguous.
struct TokenLogprobsBackwardParams {
  TokenLogprobsRows rows;
  const void *statistics, *entropy, *sum_p2;
  const void *grad_logprobs, *grad_entropy, *grad_sum_p2;
  void* grad_logits;
  bool in_place;
};

const char* launch_token_logprobs(const TokenLogprobsParams& params, Stream stream);
const char* launch_token_logprobs_backward(const TokenLogprobsBackwardParams& params, Stream stream);

}  // namespace pykern
