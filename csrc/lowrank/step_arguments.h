// Checks of the arguments of the whole steps, for the CPU and the CUDA side; `on_device` is check_cpu or its CUDA kin.
// pykern/lowrank/ops.py says what the arguments are.
#pragma once

#include "lowrank/parts_arguments.h"

namespace pykern::lowrank {

inline void check_shared(const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                         const Tensor& lr, DeviceCheck on_device) {
  check_number(lr, "lr", on_device);
  check_optional_one(grad_scale, "grad_scale", on_device);
  check_optional_one(found_inf, "found_inf", on_device);
}

inline void check_low_rank_adamw(const Tensors& param, const Tensors& grad, const Tensors& projector,
                                 const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensors& step,
                                 const Tensors& residual_norm, const Tensor& lr,
                                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                                 int64_t residual, DeviceCheck on_device) {
  const size_t count = param.size();
  check_list(grad, count, "grad");
  check_list(projector, count, "projector");
  check_list(exp_avg, count, "exp_avg");
  check_list(exp_avg_sq, count, "exp_avg_sq");
  check_list(step, count, "step");
  check_list_or_none(residual_norm, count, "residual_norm");
  STD_TORCH_CHECK(residual >= 0 && residual <= 3,
                  "residual: expected 0 (none), 1 (fira), 2 (apollo_channel) or 3 (apollo_tensor), got ", residual);
  check_shared(grad_scale, found_inf, lr, on_device);
  for (size_t i = 0; i < count; ++i) {
    const std::string name = element_name("param", i);
    const ScalarType type = param[0].scalar_type(), wide = moment_type(data_type(param[i], name.c_str()));
    check_matrix(param[i], type, name.c_str(), on_device);
    check_matrix(grad[i], type, element_name("grad", i).c_str(), on_device);
    check_same_sizes(grad[i], param[i], element_name("grad", i).c_str());
    check_projector(projector[i], param[i], element_name("projector", i).c_str(), on_device);
    const int64_t rank = projector[i].size(1), length = param[i].size(1);
    check_dense(exp_avg[i], wide, rank, length, element_name("exp_avg", i).c_str(), on_device);
    check_dense(exp_avg_sq[i], wide, rank, length, element_name("exp_avg_sq", i).c_str(), on_device);
    check_one(step[i], ScalarType::Float, element_name("step", i).c_str(), on_device);
    if (!residual_norm.empty()) {
      check_one(residual_norm[i], wide, element_name("residual_norm", i).c_str(), on_device);
    }
  }
}

inline void check_adamw(const Tensors& param, const Tensors& grad, const Tensors& exp_avg, const Tensors& exp_avg_sq,
                        const Tensors& step, const Tensor& lr, const std::optional<Tensor>& grad_scale,
                        const std::optional<Tensor>& found_inf, DeviceCheck on_device) {
  const size_t count = param.size();
  check_list(grad, count, "grad");
  check_list(exp_avg, count, "exp_avg");
  check_list(exp_avg_sq, count, "exp_avg_sq");
  check_list(step, count, "step");
  check_shared(grad_scale, found_inf, lr, on_device);
  for (size_t i = 0; i < count; ++i) {
    const auto check = [&](const Tensor& tensor, ScalarType type, const char* list) {
      const std::string name = element_name(list, i);
      on_device(tensor, name.c_str());
      check_type(tensor, type, name.c_str());
      if (param[i].numel() > 0) {
        check_layout(param[i], tensor, name.c_str());
      } else {
        check_same_sizes(tensor, param[i], name.c_str());
      }
    };
    const std::string name = element_name("param", i);
    const ScalarType type = param[0].scalar_type(), wide = moment_type(data_type(param[i], name.c_str()));
    check(param[i], type, "param");
    check(grad[i], type, "grad");
    check(exp_avg[i], wide, "exp_avg");
    check(exp_avg_sq[i], wide, "exp_avg_sq");
    check_one(step[i], ScalarType::Float, element_name("step", i).c_str(), on_device);
  }
}

}  // namespace pykern::lowrank
