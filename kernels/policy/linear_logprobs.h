// Token log-probabilities from chunks of logits that exist for a moment: the kernels between the products.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// Products of hidden states with some entries of the vocabulary, before bias and softcap: float32, or float64 for
// float64 hidden states. Row r begins at logits + r * stride; the stride is a multiple of kLinearLogprobsAlignment
// elements, and so is the buffer's place.
//
// Results are of the type of the logits. A row of negative target is not read.
struct LogitsChunk {
  DataType type;
  int64_t rows, entries;
  int64_t first_entry;  // as targets count
  void* logits;
  int64_t stride;
  const double* bias;  // of these entries, or null
  double softcap;      // 0: none
  const int64_t* targets;
  const double* row_temperature;  // null: all rows have `inverse_temperature`
  double inverse_temperature;
};
constexpr int64_t kLinearLogprobsAlignment = 8;

// Forward, first step: sums over each segment of a row, relative to the segment's largest logit. `largest`, `sum` and
// `weighted` (null without the entropy) are [segments, rows], from the chunk's first segment on; `target_logit` is
// [rows] and written where the target is among the chunk's entries.
struct LinearLogprobsSegments {
  LogitsChunk chunk;
  void *largest, *sum, *weighted, *target_logit;
};

// Second step, once for the whole vocabulary, or shard of one: entries first_entry ... first_entry + entries - 1. The
// logit of a target that isn't among them counts as 0. `statistics` is [rows, 2], as in TokenLogprobsParams.
struct LinearLogprobsJoin {
  DataType type;
  int64_t rows, segments, first_entry, entries;
  const void *largest, *sum, *weighted, *target_logit;
  const int64_t* targets;
  const double* row_temperature;
  double inverse_temperature;
  void *logprobs, *entropy, *statistics;
};

// Where a gradient of the results may be null. A row without one, or with exact zeros, takes no part.
struct LinearLogprobsRowGradients {
  const void *statistics, *entropy;
  const void *grad_logprobs, *grad_entropy;
};

// Backward: the gradient of a chunk's logits, in the type of the hidden states and with rows of chunk.stride elements.
// Rows without a part get zeros. `bias_shares`, where it is wanted, has sums over kLinearLogprobsRows rows at a time:
// [ceil(rows / kLinearLogprobsRows), stride].
struct LinearLogprobsGradient {
  LogitsChunk chunk;
  LinearLogprobsRowGradients given;
  DataType gradient_type;
  void *gradient, *bias_shares;
};
constexpr int kLinearLogprobsRows = 64;

// grad_bias[entry] = the sum of its shares, added to what is there if `add`.
struct LinearLogprobsBias {
  DataType type;
  int64_t shares, entries, stride;
  const void* bias_shares;
  double* grad_bias;
  bool add;
};

// result = sum + part, matrices whose rows are `stride` elements apart, those of part `columns`; result may be the sum,
// and is of another type where the sum is complete.
struct LinearLogprobsAccumulate {
  DataType type, result_type;
  int64_t rows, columns, stride;
  const void *sum, *part;
  void* result;
};

// A copy of the hidden states, with zeros for the rows that take no part: they may hold NaN, of which a product with
// a zero gradient would make NaN.
struct LinearLogprobsHidden {
  DataType type;
  int64_t rows, hidden_size, stride;
  const void* hidden;
  const int64_t* targets;
  LinearLogprobsRowGradients given;
  void* copy;
};

// Entries of a segment: a row's results don't depend on how the vocabulary is divided into chunks of whole segments.
int64_t linear_logprobs_segment(DataType type);

const char* launch_linear_logprobs_segments(const LinearLogprobsSegments& params, Stream stream);
const char* launch_linear_logprobs_join(const LinearLogprobsJoin& params, Stream stream);
const char* launch_linear_logprobs_gradient(const LinearLogprobsGradient& params, Stream stream);
const char* launch_linear_logprobs_bias(const LinearLogprobsBias& params, Stream stream);
const char* launch_linear_logprobs_accumulate(const LinearLogprobsAccumulate& params, Stream stream);
const char* launch_linear_logprobs_hidden(const LinearLogprobsHidden& params, Stream stream);

}  // namespace pykern
