// Checks of the arguments of risk_advantages that the CPU and the CUDA side share.
#pragma once

#include <optional>

#include "common/checks.h"

namespace pykern {

inline void check_risk(const Tensor& rewards, const Tensor& group_ids, const Tensor& bundle_ids,
                       const std::optional<Tensor>& tracked, int64_t credit, DeviceCheck on_device) {
  const auto check = [&](const Tensor& tensor, int64_t size, ScalarType type, const char* name) {
    on_device(tensor, name);
    check_dim(tensor, 1, name);
    check_size(tensor, 0, size, name);
    check_type(tensor, type, name);
    check_contiguous(tensor, name);
  };
  const ScalarType type = rewards.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "rewards: expected float32 or float64");
  STD_TORCH_CHECK(credit >= 0 && credit <= 3, "credit: unknown");
  check_dim(rewards, 1, "rewards");
  const int64_t rows = rewards.size(0);
  check(rewards, rows, type, "rewards");
  check(group_ids, rows, ScalarType::Long, "group_ids");
  check(bundle_ids, rows, ScalarType::Long, "bundle_ids");
  if (tracked) check(*tracked, 2, ScalarType::Double, "tracked");
}

}  // namespace pykern
