// Checks of the arguments of optimal_token_baseline that the CPU and the CUDA side share.
#pragma once

#include <optional>

#include "policy/returns_arguments.h"

namespace pykern {

inline void check_token_baseline(const Tensor& returns, const Tensor& logprobs, const Tensor& sum_p2,
                                 const Tensor& group_ids, const std::optional<Tensor>& mask,
                                 const std::optional<Tensor>& weights, DeviceCheck on_device) {
  const ScalarType type = returns.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "returns: expected float32 or float64");
  check_dim(returns, 2, "returns");
  check_like(returns, returns, type, "returns", on_device);
  check_like(logprobs, returns, type, "logprobs", on_device);
  check_like(sum_p2, returns, type, "sum_p2", on_device);
  check_like(weights, returns, type, "weights", on_device);
  check_like(mask, returns, ScalarType::Bool, "mask", on_device);
  on_device(group_ids, "group_ids");
  check_dim(group_ids, 1, "group_ids");
  check_size(group_ids, 0, returns.size(0), "group_ids");
  check_type(group_ids, ScalarType::Long, "group_ids");
  check_contiguous(group_ids, "group_ids");
}

}  // namespace pykern
