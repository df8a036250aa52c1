// Policy loss: what the host hands to the kernels of one instruction-set level.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace pykern {

// In the order of KL_ESTIMATORS in pykern/policy/loss.py; zero stands for none.
enum class KlEstimator : int { none, k1, k2, k3 };

// A run of tokens of one sequence. Its sums are added in the order of the segments, whoever computed them.
struct LossSegment {
  int64_t sequence, begin, end;
};

enum LossSum : int {
  kPolicySum,
  kKlSum,
  kRatioSum,
  kLogRatioSum,
  kClippedLow,
  kClippedHigh,
  kDualClipped,
  kRolloutWeightSum,
  kLossSums
};

// Pointers to float32 or float64, all of one kind; null where absent.
struct PolicyLossParams {
  const void* logprobs;
  const void* old_logprobs;
  const void* advantages;
  const void* ref_logprobs;
  const void* rollout_logprobs;
  const uint8_t* mask;
  void* coefficient;
  const LossSegment* segments;
  const int64_t* lengths;         // unmasked tokens of each sequence
  const double* sequence_weight;  // what each token of a sequence counts in the aggregate
  double* sums;                   // [segments, kLossSums]
  bool per_token_advantages;
  bool sequence_ratio;
  bool weight_clip;
  KlEstimator kl;
  double ratio_low, ratio_high, dual_clip;
  double log_ratio_limit, sequence_log_ratio_limit;
  double kl_coef, kl_log_ratio_limit, kl_limit;
  double rollout_clip;
};

PYKERN_SIMD_FUNCTION(int64_t, count_unmasked, (const uint8_t* mask, int64_t count))
PYKERN_SIMD_FUNCTION(void, policy_loss_f32, (const PolicyLossParams& params, int64_t segment))
PYKERN_SIMD_FUNCTION(void, policy_loss_f64, (const PolicyLossParams& params, int64_t segment))
PYKERN_SIMD_FUNCTION(void, scale_f32, (const float* source, float factor, float* target, int64_t count))

}  // namespace pykern
