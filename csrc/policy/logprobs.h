// Log-probability, entropy and sum of squared probabilities of one token per row of logits.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/numeric.h"

namespace pykern {

// What forward and backward share. Row r of the logits starts at element row_offset[r]; a negative
// target marks a row that is not read. Results are double where `type` is f64 and float otherwise.
struct TokenLogprobsInput {
  DataType type;
  int64_t rows, vocabulary;
  const void* logits;
  const int64_t* row_offset;
  const int64_t* targets;
  const double* inverse_temperature;
};

// `statistics` is [rows, 2]: the largest logit, and the logarithm of sum(exp((logit - largest) / T)).
// Their sum is not kept instead: at logits of 1e4 it would lose three digits of the probabilities.
// `entropy` and `sum_p2` may be null.
struct TokenLogprobsForward {
  TokenLogprobsInput input;
  void *logprobs, *entropy, *sum_p2, *statistics;
};

// A gradient may be null. `entropy` is read where `grad_entropy` is given, likewise `sum_p2`.
// In place, `grad_logits` is the logits, with their row offsets; else it is contiguous.
struct TokenLogprobsBackward {
  TokenLogprobsInput input;
  const void *statistics, *entropy, *sum_p2;
  const void *grad_logprobs, *grad_entropy, *grad_sum_p2;
  void* grad_logits;
  bool in_place;
};

PYKERN_SIMD_FUNCTION(void, token_logprobs_forward, (const TokenLogprobsForward& params))
PYKERN_SIMD_FUNCTION(void, token_logprobs_backward, (const TokenLogprobsBackward& params))

// The same for float64, in plain loops.
void token_logprobs_forward_f64(const TokenLogprobsForward& params);
void token_logprobs_backward_f64(const TokenLogprobsBackward& params);

}  // namespace pykern
