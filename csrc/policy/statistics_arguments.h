// Checks of the arguments of group_statistics that the CPU and the CUDA side share; `on_device` is check_cpu or its
// CUDA kin.
#pragma once

#include "common/checks.h"

namespace pykern {

inline void check_group_statistics(const Tensor& values, const Tensor& group_ids, int64_t ddof, DeviceCheck on_device) {
  constexpr int64_t kMostRows = (int64_t{1} << 31) - 1;
  const ScalarType type = values.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "values: expected float32 or float64");
  on_device(values, "values");
  check_dim(values, 1, "values");
  check_contiguous(values, "values");
  STD_TORCH_CHECK(values.size(0) <= kMostRows, "values: expected at most ", kMostRows, " rows, got ", values.size(0));
  on_device(group_ids, "group_ids");
  check_dim(group_ids, 1, "group_ids");
  check_size(group_ids, 0, values.size(0), "group_ids");
  check_type(group_ids, ScalarType::Long, "group_ids");
  check_contiguous(group_ids, "group_ids");
  STD_TORCH_CHECK(ddof == 0 || ddof == 1, "ddof: expected 0 or 1, got ", ddof);
}

}  // namespace pykern
