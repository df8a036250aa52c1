// Checks of the ops' arguments that the CPU and the CUDA side share; `on_device` is check_cpu or its CUDA kin.
#pragma once

#include <optional>

#include "common/checks.h"

namespace pykern {

// --- group_advantages --------------------------------------------------------------------------------------

inline void check_row_values(const std::optional<Tensor>& tensor, int64_t rows, ScalarType type, const char* name,
                             DeviceCheck on_device) {
  if (!tensor) return;
  on_device(*tensor, name);
  check_dim(*tensor, 1, name);
  check_size(*tensor, 0, rows, name);
  check_type(*tensor, type, name);
  check_contiguous(*tensor, name);
}

// `baseline` and `scale` count in BASELINES and SCALES of pykern/policy/advantages.py.
inline void check_advantages(const Tensor& rewards, const Tensor& group_ids, const std::optional<Tensor>& lengths,
                             const std::optional<Tensor>& baseline_rewards, int64_t baseline, int64_t scale,
                             DeviceCheck on_device) {
  constexpr int64_t kLengthWeighted = 3, kGiven = 4, kTokenWhiten = 3;
  check_dim(rewards, 1, "rewards");
  const int64_t rows = rewards.size(0);
  const ScalarType type = rewards.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "rewards: expected float32 or float64");
  STD_TORCH_CHECK(baseline >= 0 && baseline <= 4 && scale >= 0 && scale <= 3, "baseline or scale: unknown");
  STD_TORCH_CHECK(lengths || (baseline != kLengthWeighted && scale != kTokenWhiten),
                  "lengths: this estimator needs them");
  STD_TORCH_CHECK(baseline_rewards.has_value() == (baseline == kGiven),
                  "baseline_rewards: needed by a given baseline, and by no other");
  check_row_values(rewards, rows, type, "rewards", on_device);
  check_row_values(group_ids, rows, ScalarType::Long, "group_ids", on_device);
  check_row_values(lengths, rows, ScalarType::Long, "lengths", on_device);
  check_row_values(baseline_rewards, rows, type, "baseline_rewards", on_device);
}

}  // namespace pykern
