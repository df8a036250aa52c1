// Checks of the ops' arguments that the CPU and the CUDA side share; `on_device` is check_cpu or its CUDA kin.
#pragma once

#include <optional>

#include "common/checks.h"

namespace pykern::lowrank {

inline bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// One float32 or float64 element.
inline void check_number(const Tensor& tensor, const char* name, DeviceCheck on_device) {
  on_device(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
  if (!is_double(tensor)) check_type(tensor, ScalarType::Float, name);
}

inline ScalarType moment_type(DataType type) { return type == DataType::f64 ? ScalarType::Double : ScalarType::Float; }

inline void check_moment(const Tensor& moment, DataType type, const char* name, DeviceCheck on_device) {
  on_device(moment, name);
  check_type(moment, moment_type(type), name);
}

inline void check_same_sizes(const Tensor& tensor, const Tensor& like, const char* name) {
  check_dim(tensor, like.dim(), name);
  for (int64_t dim = 0; dim < like.dim(); ++dim) check_size(tensor, dim, like.size(dim), name);
}

inline void check_low_rank(const Tensor& param, const Tensor& grad, const Tensor& projector, const Tensor& exp_avg,
                           const Tensor& exp_avg_sq, const Tensor& step, const std::optional<Tensor>& residual_norm,
                           const Tensor& lr, bool right, DeviceCheck on_device) {
  on_device(param, "param");
  on_device(grad, "grad");
  on_device(projector, "projector");
  check_dim(param, 2, "param");
  check_dim(projector, 2, "projector");
  const DataType type = data_type(param, "param");
  check_type(grad, param.scalar_type(), "grad");
  check_type(projector, param.scalar_type(), "projector");
  check_same_sizes(grad, param, "grad");
  const int64_t rank = projector.size(1);
  for (int64_t dim = 0; dim < 2; ++dim) {
    const int64_t size = (dim == 0) == right ? param.size(dim) : rank;
    check_size(exp_avg, dim, size, "exp_avg");
    check_size(exp_avg_sq, dim, size, "exp_avg_sq");
  }
  check_size(projector, 0, right ? param.size(1) : param.size(0), "projector");
  STD_TORCH_CHECK(rank > 0 || param.numel() == 0, "projector: expected at least one column");
  STD_TORCH_CHECK(param.size(1) <= 1 || param.stride(1) == 1, "param: expected unit stride along the columns");
  STD_TORCH_CHECK(grad.size(1) <= 1 || grad.stride(1) == 1, "grad: expected unit stride along the columns");
  check_contiguous(projector, "projector");
  check_contiguous(exp_avg, "exp_avg");
  check_contiguous(exp_avg_sq, "exp_avg_sq");
  check_moment(exp_avg, type, "exp_avg", on_device);
  check_moment(exp_avg_sq, type, "exp_avg_sq", on_device);
  if (residual_norm) {
    check_moment(*residual_norm, type, "residual_norm", on_device);
    STD_TORCH_CHECK(residual_norm->numel() == 1, "residual_norm: expected one element");
  }
  check_number(step, "step", on_device);
  check_number(lr, "lr", on_device);
}

// The elements are visited in the order of memory, so all tensors must lie alike, without gaps.
inline void check_layout(const Tensor& param, const Tensor& other, const char* name) {
  check_dim(other, param.dim(), name);
  int64_t span = 1;
  for (int64_t dim = 0; dim < param.dim(); ++dim) {
    check_size(other, dim, param.size(dim), name);
    STD_TORCH_CHECK(param.size(dim) == 1 || other.stride(dim) == param.stride(dim), name,
                    ": expected the strides of param");
    span += (param.size(dim) - 1) * param.stride(dim);
  }
  STD_TORCH_CHECK(span == param.numel(), "param: expected a tensor without gaps");
}

inline void check_adam(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                       const Tensor& step, const Tensor& lr, DeviceCheck on_device) {
  on_device(param, "param");
  on_device(grad, "grad");
  const DataType type = data_type(param, "param");
  check_type(grad, param.scalar_type(), "grad");
  check_moment(exp_avg, type, "exp_avg", on_device);
  check_moment(exp_avg_sq, type, "exp_avg_sq", on_device);
  if (param.numel() > 0) {
    check_layout(param, grad, "grad");
    check_layout(param, exp_avg, "exp_avg");
    check_layout(param, exp_avg_sq, "exp_avg_sq");
  }
  check_number(step, "step", on_device);
  check_number(lr, "lr", on_device);
}

inline void check_scale(const Tensor& scale, const Tensor& low, int64_t blocks, const char* name,
                        DeviceCheck on_device) {
  on_device(scale, name);
  check_type(scale, ScalarType::Float, name);
  check_dim(scale, 2, name);
  check_size(scale, 0, low.size(0), name);
  check_size(scale, 1, blocks, name);
  check_contiguous(scale, name);
}

// `blocks`: quantised blocks in a row of low. Returns whether the moments are quantised.
inline bool check_phase(const Tensor& low, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                        const std::optional<Tensor>& exp_avg_scale, const std::optional<Tensor>& exp_avg_sq_scale,
                        const Tensor& step, int64_t (*blocks)(int64_t length), DeviceCheck on_device) {
  on_device(low, "low");
  const DataType type = data_type(low, "low");
  check_contiguous(low, "low");
  const bool quantised = exp_avg_scale.has_value();
  STD_TORCH_CHECK(quantised == exp_avg_sq_scale.has_value(),
                  "exp_avg_sq_scale: expected scales of both moments, or of none");
  if (quantised) {
    check_dim(low, 2, "low");
    STD_TORCH_CHECK(type != DataType::f64, "low: expected float32, bfloat16 or float16 with 8-bit moments");
    check_scale(*exp_avg_scale, low, blocks(low.size(1)), "exp_avg_scale", on_device);
    check_scale(*exp_avg_sq_scale, low, blocks(low.size(1)), "exp_avg_sq_scale", on_device);
  }
  const auto check = [&](const Tensor& moment, const char* name) {
    on_device(moment, name);
    check_type(moment, quantised ? ScalarType::Byte : moment_type(type), name);
    check_same_sizes(moment, low, name);
    check_contiguous(moment, name);
  };
  check(exp_avg, "exp_avg");
  check(exp_avg_sq, "exp_avg_sq");
  check_number(step, "step", on_device);
  return quantised;
}

}  // namespace pykern::lowrank
