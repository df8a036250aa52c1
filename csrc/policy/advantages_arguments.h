// Checks of the arguments of group_advantages and group_entropy that the CPU and the CUDA side share; `on_device` is
// check_cpu or its CUDA kin.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"
#include "kernels/policy/advantages_parts.h"

namespace pykern {

inline void check_row_values(const std::optional<Tensor>& tensor, int64_t rows, ScalarType type, const char* name,
                             DeviceCheck on_device) {
  if (!tensor) return;
  on_device(*tensor, name);
  check_dim(*tensor, 1, name);
  check_size(*tensor, 0, rows, name);
  check_type(*tensor, type, name);
  check_contiguous(*tensor, name);
}

template <class Part>
Part advantage_part(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < static_cast<int64_t>(Part::count), name, ": unknown, ", value);
  return static_cast<Part>(value);
}

// What the arguments of an advantage say beside the tensors.
struct AdvantageRequest {
  bool decompose;
  Transform transform;
  Baseline baseline;
  Scale scale;
  Finish finish;
  Filter filter;
  int ddof;
  bool singleton_self;
  const std::vector<double>& settings;

  double setting(AdvantageSetting name) const { return settings[static_cast<size_t>(name)]; }
};

inline AdvantageRequest check_advantages(const Tensor& rewards, const std::vector<double>& component_weights,
                                         const Tensor& group_ids, const std::optional<Tensor>& lengths,
                                         const std::optional<Tensor>& baseline_rewards, bool decompose,
                                         int64_t transform, int64_t baseline, int64_t scale, int64_t finish,
                                         int64_t filter, int64_t ddof, bool singleton_self,
                                         const std::vector<double>& settings, DeviceCheck on_device) {
  const AdvantageRequest request{decompose,
                                 advantage_part<Transform>(transform, "transform"),
                                 advantage_part<Baseline>(baseline, "baseline"),
                                 advantage_part<Scale>(scale, "scale"),
                                 advantage_part<Finish>(finish, "finish"),
                                 advantage_part<Filter>(filter, "filter"),
                                 static_cast<int>(ddof),
                                 singleton_self,
                                 settings};
  on_device(rewards, "rewards");
  check_dim(rewards, 2, "rewards");
  check_contiguous(rewards, "rewards");
  const int64_t rows = rewards.size(0), components = rewards.size(1);
  const ScalarType type = rewards.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "rewards: expected float32 or float64");
  STD_TORCH_CHECK(components >= 1 && components <= kMaxComponents, "rewards: expected 1 to ", kMaxComponents,
                  " components, got ", components);
  STD_TORCH_CHECK(static_cast<int64_t>(component_weights.size()) == components,
                  "component_weights: expected one per component");
  STD_TORCH_CHECK(settings.size() == static_cast<size_t>(AdvantageSetting::count), "settings: expected ",
                  static_cast<int>(AdvantageSetting::count), " values");
  STD_TORCH_CHECK(ddof == 0 || ddof == 1, "ddof: expected 0 or 1");
  STD_TORCH_CHECK(request.setting(AdvantageSetting::k) >= 1, "k: expected at least 1");
  const bool needs_lengths = request.transform == Transform::relative_length ||
                             weighs_by_length(request.baseline, request.scale) ||
                             request.finish == Finish::token_whiten ||
                             request.setting(AdvantageSetting::overlong_buffer) > 0;
  STD_TORCH_CHECK(lengths || !needs_lengths, "lengths: this estimator needs them");
  STD_TORCH_CHECK(baseline_rewards.has_value() == (request.baseline == Baseline::given),
                  "baseline_rewards: needed by a given baseline, and by no other");
  check_row_values(group_ids, rows, ScalarType::Long, "group_ids", on_device);
  check_row_values(lengths, rows, ScalarType::Long, "lengths", on_device);
  check_row_values(baseline_rewards, rows, type, "baseline_rewards", on_device);
  return request;
}

inline void check_entropy(const Tensor& group_ids, const Tensor& answer_ids, DeviceCheck on_device) {
  check_dim(group_ids, 1, "group_ids");
  check_row_values(group_ids, group_ids.size(0), ScalarType::Long, "group_ids", on_device);
  check_row_values(answer_ids, group_ids.size(0), ScalarType::Long, "answer_ids", on_device);
}

}  // namespace pykern
