// Checks of the arguments of discounted_scan and masked_whiten that the CPU and the CUDA side share.
#pragma once

#include <optional>

#include "common/checks.h"

namespace pykern {

inline void check_like(const std::optional<Tensor>& tensor, const Tensor& first, ScalarType type, const char* name,
                       DeviceCheck on_device) {
  if (!tensor) return;
  on_device(*tensor, name);
  check_type(*tensor, type, name);
  check_contiguous(*tensor, name);
  check_dim(*tensor, first.dim(), name);
  for (int64_t dim = 0; dim < first.dim(); ++dim) check_size(*tensor, dim, first.size(dim), name);
}

inline void check_scan(const Tensor& rewards, const std::optional<Tensor>& values, const std::optional<Tensor>& mask,
                       DeviceCheck on_device) {
  const ScalarType type = rewards.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "rewards: expected float32 or float64");
  check_like(rewards, rewards, type, "rewards", on_device);
  check_like(values, rewards, type, "values", on_device);
  check_like(mask, rewards, ScalarType::Bool, "mask", on_device);
}

inline void check_lambdas(const std::optional<Tensor>& lambdas, int64_t sequences, DeviceCheck on_device) {
  if (!lambdas) return;
  on_device(*lambdas, "lambdas");
  check_dim(*lambdas, 1, "lambdas");
  check_size(*lambdas, 0, sequences, "lambdas");
  check_type(*lambdas, ScalarType::Double, "lambdas");
  check_contiguous(*lambdas, "lambdas");
}

inline void check_whiten(const Tensor& values, const std::optional<Tensor>& mask, double eps, int64_t ddof,
                         DeviceCheck on_device) {
  const ScalarType type = values.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "values: expected float32 or float64");
  STD_TORCH_CHECK(eps >= 0 && (ddof == 0 || ddof == 1), "eps or ddof: out of range");
  check_like(values, values, type, "values", on_device);
  check_like(mask, values, ScalarType::Bool, "mask", on_device);
}

}  // namespace pykern
