// rollout_correction on a GPU: what the host hands over. A block per sequence looks at its tokens twice, first for what
// holds of all of them, and the last block adds up what the sequences have measured; normalised weights are divided
// by a second launch.
#pragma once

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"
#include "kernels/policy/rollout_metrics.h"
#include "kernels/policy/token_batch.h"

namespace pykern {

struct RolloutParams {
  const void *old_logprobs, *rollout_logprobs;  // float32 or float64, as are weights and metrics
  TokenBatch batch;
  RolloutRules rules;
  void* weights;                 // per token, or per sequence by the rules; null for none
  uint8_t* keep;                 // [tokens]
  void* metrics;                 // [kRolloutMetrics]
  double* columns;               // [sequences, kPaddedColumns]
  double* divisor;               // [1]
  unsigned long long* finished;  // zero at first
};

const char* launch_rollout_correction(DataType type, const RolloutParams& params, Stream stream);

}  // namespace pykern
