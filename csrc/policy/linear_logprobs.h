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
// `entropy` may be null.
struct LinearLogprobsForward {
  LinearLogprobsInput input;
  void *logprobs, *entropy, *statistics;
};

// A gradient may be null, of the results as of the inputs. grad_weight [vocabulary, hidden_size] and
// grad_hidden are contiguous and of type `type`; grad_bias is double. grad_weight and grad_bias are
// written whole, grad_hidden in the active rows.
struct LinearLogprobsBackward {
  LinearLogprobsInput input;
  const void *statistics, *entropy;
  const void *grad_logprobs, *grad_entropy;
  void *grad_hidden, *grad_weight;
  double* grad_bias;
};

// False if the machine has no memory for the workspace.
PYKERN_SIMD_FUNCTION(bool, linear_logprobs_forward, (const LinearLogprobsForward& params))
PYKERN_SIMD_FUNCTION(bool, linear_logprobs_backward, (const LinearLogprobsBackward& params))

// The same for float64, in plain loops.
void linear_logprobs_forward_f64(const LinearLogprobsForward& params);
void linear_logprobs_backward_f64(const LinearLogprobsBackward& params);

}  // namespace pykern
