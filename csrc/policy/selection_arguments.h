// Checks of the selection ops' arguments that the CPU and the CUDA side share.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"

namespace pykern {

inline void check_values(const Tensor& values, DeviceCheck on_device) {
  const ScalarType type = values.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "values: expected float32 or float64");
  on_device(values, "values");
  check_contiguous(values, "values");
}

inline void check_flags(const std::optional<Tensor>& flags, const Tensor& values, const char* name,
                        DeviceCheck on_device) {
  if (!flags) return;
  on_device(*flags, name);
  check_type(*flags, ScalarType::Bool, name);
  check_contiguous(*flags, name);
  check_dim(*flags, values.dim(), name);
  for (int64_t dim = 0; dim < values.dim(); ++dim) check_size(*flags, dim, values.size(dim), name);
}

inline void check_quantiles(const Tensor& values, const std::optional<Tensor>& mask,
                            const std::vector<double>& quantiles, int64_t interpolation, DeviceCheck on_device) {
  check_values(values, on_device);
  check_flags(mask, values, "mask", on_device);
  for (const double quantile : quantiles) {
    STD_TORCH_CHECK(quantile >= 0 && quantile <= 1, "quantiles: expected numbers from 0 to 1, got ", quantile);
  }
  STD_TORCH_CHECK(interpolation >= 0 && interpolation <= 3, "interpolation: unknown");
}

inline void check_share(const Tensor& values, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& candidates, int64_t order, double share, int64_t minimum,
                        DeviceCheck on_device) {
  check_values(values, on_device);
  check_flags(mask, values, "mask", on_device);
  check_flags(candidates, values, "candidates", on_device);
  STD_TORCH_CHECK(order >= 0 && order <= 2, "order: unknown");
  STD_TORCH_CHECK(share >= 0 && share <= 1, "share: expected a number from 0 to 1, got ", share);
  STD_TORCH_CHECK(minimum >= 0, "minimum: expected a count, got ", minimum);
}

inline void check_moments(const Tensor& values, const std::optional<Tensor>& mask, const std::optional<Tensor>& centre,
                          DeviceCheck on_device) {
  check_values(values, on_device);
  check_flags(mask, values, "mask", on_device);
  if (!centre) return;
  on_device(*centre, "centre");
  check_type(*centre, ScalarType::Double, "centre");
  STD_TORCH_CHECK(centre->numel() == 1, "centre: expected one element");
}

}  // namespace pykern
