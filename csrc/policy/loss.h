// Policy loss: what the host hands to the kernels of one instruction-set level.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace pykern {

// In the order of the tables in pykern/policy/losses.py; an estimator's zero stands for none.
enum class RatioLevel : int { token, sequence, product, clipped_sequence };
enum class LossRule : int { clip, weight, log, gate, taper };
enum class Stabilisation : int { none, total_variation, binary_kl };
enum class KlEstimator : int { none, k1, k2, k3, absolute };
enum class KlGradient : int { value, straight_through, importance };

// Which parts a loss has, so that the common ones need not ask for the rare. Plain: token ratios under the clip rule,
// without ratio_limit and negative_scale. Common: any ratio and rule. Neither takes a tensor beside those of the KL
// estimate and of the rollout, drops tokens, or changes the estimate's gradient.
enum class LossParts : int { plain, common, all };

// A run of tokens of one sequence. Its sums are added in the order of the segments, whoever computed them.
struct LossSegment {
  int64_t sequence, begin, end;
};

enum LossSum : int {
  // Of what makes up the loss, each token as its weight counts.
  kPolicySum,
  kWeightedKl,
  kWeightedAnchor,
  kWeightedEntropy,
  // For the metrics, each token once.
  kKlSum,
  kAnchorSum,
  kEntropySum,
  kRatioSum,
  kLogRatioSum,
  kClippedLow,
  kClippedHigh,
  kDualClipped,
  kRolloutWeightSum,
  kKept,
  kLossSums
};

// One value per token or per sequence; null where absent.
struct LossValues {
  const void* data;
  bool per_token;
};

// Pointers to float32 or float64, all of one kind; null where absent.
struct PolicyLossParams {
  const void* logprobs;
  const void* old_logprobs;
  const void* ref_logprobs;
  const void* anchor_logprobs;
  const void* rollout_logprobs;
  const void* entropy;
  const void* clip_low;
  const void* clip_high;
  const void* token_weights;
  LossValues advantages, second_advantages, advantage_weights, rollout_weights;
  const uint8_t* mask;
  const uint8_t* keep;
  const uint8_t* anchor_keep;
  void* coefficient;
  void* entropy_coefficient;
  const LossSegment* segments;
  const int64_t* lengths;         // unmasked tokens of each sequence
  const double* sequence_weight;  // what each token of a sequence counts in the aggregate; 1 beside token_weights
  double* sums;                   // [segments, kLossSums]

  RatioLevel ratio;
  LossRule rule;
  Stabilisation stabilisation;
  KlEstimator kl, anchor;
  KlGradient kl_gradient;
  bool weight_negative_only;
  bool rollout_mask;  // instead of truncation
  LossParts parts;

  double ratio_low, ratio_high, ratio_limit, dual_clip;
  double shape[4];
  double negative_scale;
  double stabilisation_low, stabilisation_high;
  double log_ratio_limit, sequence_log_ratio_low, sequence_log_ratio_high;
  double kl_coef, kl_log_ratio_limit, kl_limit;
  double anchor_coef;
  double rollout_low, rollout_high;
  double entropy_coef;
};

PYKERN_SIMD_FUNCTION(int64_t, count_unmasked, (const uint8_t* mask, int64_t count))
PYKERN_SIMD_FUNCTION(void, policy_loss_f32, (const PolicyLossParams& params, int64_t segment))
PYKERN_SIMD_FUNCTION(void, policy_loss_f64, (const PolicyLossParams& params, int64_t segment))
PYKERN_SIMD_FUNCTION(void, scale_f32, (const float* source, float factor, float* target, int64_t count))

}  // namespace pykern
