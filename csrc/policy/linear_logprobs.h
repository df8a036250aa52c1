// Token log-probabilities straight from hidden states and the output head's weight.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/numeric.h"

namespace pykern {

// What forward and backward share. Only the `rows` rows listed in `active`, in rising order, are
// read or written. `weight` and `bias` are the entries [vocabulary_start, vocabulary_start + vocabulary)
// of the vocabulary that the targets count in; a target outside of them is a logit of 0, and in the
// backward none. `bias` may be null; softcap 0 means none. Results are double where `type` is f64
// and float otherwise. hidden, weight and the gradients of both have unit stride along hidden_size.
struct LinearLogprobsInput {
  DataType type;
  int64_t rows, hidden_size, vocabulary, vocabulary_start;
  const int64_t* active;
  const void *hidden, *weight;
  int64_t hidden_stride, weight_stride;
  const double* bias;
  const int64_t* targets;
  const double* inverse_temperature;
  double softcap;
};

// `statistics` is [all rows, 2], as in TokenLogprobsForward, of the logits after bias and softcap.
// `entropy` may be null. `kept`, if not null, receives the logits of the active rows after bias and
// softcap, for the backward: round_up(rows, kKeptRows) * round_up(vocabulary, kKeptEntries) floats in
// an order of its own.
struct LinearLogprobsForward {
  LinearLogprobsInput input;
  void *logprobs, *entropy, *statistics;
  float* kept = nullptr;
};
constexpr int64_t kKeptRows = 64, kKeptEntries = 192;

// A gradient may be null, of the results as of the inputs. grad_weight [vocabulary, hidden_size] and
// grad_hidden are contiguous and of type `type`; grad_bias is double. grad_weight and grad_bias are
// written whole, grad_hidden in the active rows.
//
// With `kept` of a forward over `kept_rows` rows, active row i was its row kept_index[i]; no logits are
// computed, and grad_bias is added to. With `weight_sums`, its rows sums_stride apart with room for whole
// vectors, the gradient is added there, in place of grad_weight.
struct LinearLogprobsBackward {
  LinearLogprobsInput input;
  const void *statistics, *entropy;
  const void *grad_logprobs, *grad_entropy;
  void *grad_hidden, *grad_weight;
  double* grad_bias;
  const float* kept = nullptr;
  const int64_t* kept_index = nullptr;
  int64_t kept_rows = 0;
  float* weight_sums = nullptr;
  int64_t sums_stride = 0;
};

// False if the machine has no memory for the workspace.
PYKERN_SIMD_FUNCTION(bool, linear_logprobs_forward, (const LinearLogprobsForward& params))
PYKERN_SIMD_FUNCTION(bool, linear_logprobs_backward, (const LinearLogprobsBackward& params))

// The same for float64, in plain loops.
void linear_logprobs_forward_f64(const LinearLogprobsForward& params);
void linear_logprobs_backward_f64(const LinearLogprobsBackward& params);

}  // namespace pykern
