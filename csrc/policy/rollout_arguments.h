// Arguments of rollout_correction, that the CPU and the CUDA side share.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/policy/rollout_metrics.h"
#include "policy/token_batch.h"

namespace pykern {

// In the order of the floats that pykern/policy/rollout.py passes.
enum RolloutSetting : int {
  kWeightLow,
  kWeightHigh,
  kLimit,
  kVeto,
  kBounds,
  kRolloutSettings = kBounds + 2 * kCriteria
};

inline RolloutRules rollout_rules(int64_t weight, bool weight_mask, int64_t criteria, bool unscored_are_one,
                                  bool normalize, const std::vector<double>& settings) {
  STD_TORCH_CHECK(weight >= 0 && weight <= 3, "weight: unknown");
  STD_TORCH_CHECK(criteria >= 0 && criteria < int64_t{1} << kCriteria, "criteria: unknown");
  STD_TORCH_CHECK(settings.size() == kRolloutSettings, "settings: expected ", int(kRolloutSettings), " values");
  RolloutRules rules{};
  rules.weight = static_cast<RolloutWeight>(weight);
  rules.weight_mask = weight_mask;
  rules.unscored_are_one = unscored_are_one;
  rules.normalize = normalize;
  rules.criteria = static_cast<unsigned>(criteria);
  for (int criterion = 0; criterion < kCriteria; ++criterion) {
    rules.low[criterion] = settings[kBounds + 2 * criterion];
    rules.high[criterion] = settings[kBounds + 2 * criterion + 1];
  }
  rules.weight_low = settings[kWeightLow];
  rules.weight_high = settings[kWeightHigh];
  rules.limit = settings[kLimit];
  rules.veto_log = std::log(settings[kVeto]);
  return rules;
}

}  // namespace pykern
