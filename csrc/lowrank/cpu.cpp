// Host side of the optimizer steps on the CPU.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "lowrank/rule.h"
#include "lowrank/step.h"
#include "lowrank/step_arguments.h"

namespace pykern {
namespace {

void run_low_rank(std::vector<Tensor> param, std::vector<Tensor> grad, std::vector<Tensor> projector,
                  std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> step,
                  std::vector<Tensor> residual_norm, Tensor lr, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf, double beta1, double beta2, double eps, bool corrected_eps,
                  double weight_decay, bool decay_after, double scale, int64_t residual, double removed, double growth,
                  bool zero_norm_limits, double amplitude, bool amplitude_first, bool orthonormal, bool maximize) {
  lowrank::check_low_rank_adamw(param, grad, projector, exp_avg, exp_avg_sq, step, residual_norm, lr, grad_scale,
                                found_inf, residual, check_cpu);
  if (param.empty() || lowrank::is_skipped(found_inf)) return;
  const double rate = lowrank::number(lr), sign = lowrank::gradient_factor(grad_scale, maximize);
  std::vector<lowrank::Matrix> matrices;
  for (size_t i = 0; i < param.size(); ++i) {
    lowrank::Matrix matrix{};
    matrix.rule = lowrank::next_rule(step[i], rate, beta1, beta2, eps, weight_decay, decay_after, corrected_eps, sign);
    if (param[i].numel() == 0) continue;
    matrix.n = param[i].size(0);
    matrix.length = param[i].size(1);
    matrix.rank = projector[i].size(1);
    const lowrank::MatrixStrides weights = lowrank::matrix_strides(param[i], "param");
    const lowrank::MatrixStrides gradients = lowrank::matrix_strides(grad[i], "grad");
    matrix.param = param[i].mutable_data_ptr();
    matrix.param_place = weights.row;
    matrix.param_line = weights.column;
    matrix.grad = grad[i].const_data_ptr();
    matrix.grad_place = gradients.row;
    matrix.grad_line = gradients.column;
    matrix.projector = projector[i].const_data_ptr();
    matrix.exp_avg = exp_avg[i].mutable_data_ptr();
    matrix.exp_avg_sq = exp_avg_sq[i].mutable_data_ptr();
    if (!residual_norm.empty()) matrix.residual_norm = residual_norm[i].mutable_data_ptr();
    matrices.push_back(matrix);
  }
  lowrank::LowRankStep request{};
  request.type = data_type(param[0], "param");
  request.matrices = matrices.data();
  request.count = static_cast<int64_t>(matrices.size());
  request.residual = static_cast<lowrank::Residual>(residual);
  request.scale = scale;
  request.removed = removed;
  request.limit = {request.residual == lowrank::Residual::apollo_tensor, growth, amplitude, amplitude_first,
                   zero_norm_limits};
  request.orthonormal = orthonormal;
  bool done = true;
  if (request.type == DataType::f64) {
    for (const lowrank::Matrix& matrix : matrices) done = done && lowrank::low_rank_step_double(request, matrix);
  } else {
    done = low_rank_step()(request);
  }
  STD_TORCH_CHECK(done, "low_rank_adamw_step: out of memory");
}

void run_adam(std::vector<Tensor> param, std::vector<Tensor> grad, std::vector<Tensor> exp_avg,
              std::vector<Tensor> exp_avg_sq, std::vector<Tensor> step, Tensor lr, std::optional<Tensor> grad_scale,
              std::optional<Tensor> found_inf, double beta1, double beta2, double eps, double weight_decay,
              bool decay_after, bool corrected_eps, bool maximize) {
  lowrank::check_adamw(param, grad, exp_avg, exp_avg_sq, step, lr, grad_scale, found_inf, check_cpu);
  if (param.empty() || lowrank::is_skipped(found_inf)) return;
  const double rate = lowrank::number(lr), sign = lowrank::gradient_factor(grad_scale, maximize);
  std::vector<lowrank::AdamTensor> tensors;
  for (size_t i = 0; i < param.size(); ++i) {
    lowrank::AdamTensor tensor{};
    tensor.size = param[i].numel();
    tensor.rule = lowrank::next_rule(step[i], rate, beta1, beta2, eps, weight_decay, decay_after, corrected_eps, sign);
    tensor.param = param[i].mutable_data_ptr();
    tensor.grad = grad[i].const_data_ptr();
    tensor.exp_avg = exp_avg[i].mutable_data_ptr();
    tensor.exp_avg_sq = exp_avg_sq[i].mutable_data_ptr();
    tensors.push_back(tensor);
  }
  lowrank::AdamStep request{};
  request.type = data_type(param[0], "param");
  request.tensors = tensors.data();
  request.count = static_cast<int64_t>(tensors.size());
  if (request.type == DataType::f64) {
    for (const lowrank::AdamTensor& tensor : tensors) lowrank::adam_step_double(tensor);
  } else {
    STD_TORCH_CHECK(adam_step()(request), "adamw_step: out of memory");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("low_rank_adamw_step", TORCH_BOX(&run_low_rank));
  m.impl("adamw_step", TORCH_BOX(&run_adam));
}

}  // namespace pykern
