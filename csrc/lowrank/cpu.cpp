// Host side of the optimizer steps on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "common/checks.h"
#include "lowrank/step.h"

namespace pykern {
namespace {

using lowrank::AdamRule;

double scalar(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
  if (tensor.scalar_type() == ScalarType::Double) return *input<double>(tensor);
  check_type(tensor, ScalarType::Float, name);
  return *input<float>(tensor);
}

// Counts the step and folds the bias corrections: into the moments, or, with the epsilon added to
// the uncorrected root, into the step size.
AdamRule next_rule(const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                   bool decay_after, bool corrected_eps, bool maximize) {
  const double count = scalar(step, "step") + 1;
  if (step.scalar_type() == ScalarType::Double) {
    *output<double>(step) = count;
  } else {
    *output<float>(step) = static_cast<float>(count);
  }
  const double rate = scalar(lr, "lr");
  const double first = 1 / (1 - std::pow(beta1, count)), root = std::sqrt(1 - std::pow(beta2, count));
  AdamRule rule{};
  rule.beta1 = beta1;
  rule.beta2 = beta2;
  rule.eps = eps;
  rule.first = corrected_eps ? first : 1.0;
  rule.second = corrected_eps ? 1 / root : 1.0;
  rule.decay = 1 - rate * weight_decay;
  rule.step_size = corrected_eps ? rate : rate * root * first;
  if (decay_after) rule.step_size *= rule.decay;
  rule.sign = maximize ? -1.0 : 1.0;
  return rule;
}

void check_moment(const Tensor& moment, DataType type, const char* name) {
  check_cpu(moment, name);
  check_type(moment, type == DataType::f64 ? ScalarType::Double : ScalarType::Float, name);
}

void run_low_rank(const Tensor& param, const Tensor& grad, const Tensor& projector, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const Tensor& step, const std::optional<Tensor>& residual_norm,
                  const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, double scale,
                  bool right, bool decay_after, bool corrected_eps, bool scaled_residual, bool maximize) {
  lowrank::LowRankStep request{};
  check_cpu(param, "param");
  check_cpu(grad, "grad");
  check_cpu(projector, "projector");
  check_dim(param, 2, "param");
  check_dim(grad, 2, "grad");
  check_dim(projector, 2, "projector");
  request.type = data_type(param, "param");
  request.rows = param.size(0);
  request.columns = param.size(1);
  request.rank = projector.size(1);
  request.right = right;
  check_type(grad, param.scalar_type(), "grad");
  check_type(projector, param.scalar_type(), "projector");
  for (int64_t dim = 0; dim < 2; ++dim) {
    check_size(grad, dim, param.size(dim), "grad");
    const int64_t size = (dim == 0) == right ? param.size(dim) : request.rank;
    check_size(exp_avg, dim, size, "exp_avg");
    check_size(exp_avg_sq, dim, size, "exp_avg_sq");
  }
  check_size(projector, 0, right ? request.columns : request.rows, "projector");
  STD_TORCH_CHECK(param.size(1) <= 1 || param.stride(1) == 1, "param: expected unit stride along the columns");
  STD_TORCH_CHECK(grad.size(1) <= 1 || grad.stride(1) == 1, "grad: expected unit stride along the columns");
  check_contiguous(projector, "projector");
  check_contiguous(exp_avg, "exp_avg");
  check_contiguous(exp_avg_sq, "exp_avg_sq");
  check_moment(exp_avg, request.type, "exp_avg");
  check_moment(exp_avg_sq, request.type, "exp_avg_sq");
  if (residual_norm) {
    check_moment(*residual_norm, request.type, "residual_norm");
    STD_TORCH_CHECK(residual_norm->numel() == 1, "residual_norm: expected one element");
    request.residual_norm = residual_norm->mutable_data_ptr();
  }
  request.rule = next_rule(step, lr, beta1, beta2, eps, weight_decay, decay_after, corrected_eps, maximize);
  request.param_stride = param.stride(0);
  request.grad_stride = grad.stride(0);
  request.param = param.mutable_data_ptr();
  request.grad = grad.const_data_ptr();
  request.projector = projector.const_data_ptr();
  request.exp_avg = exp_avg.mutable_data_ptr();
  request.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
  request.scale = scale;
  request.removed = scaled_residual ? scale : 1.0;
  request.zero_norm_limits = scaled_residual;
  if (request.rows == 0 || request.columns == 0) return;
  const bool done =
      request.type == DataType::f64 ? lowrank::low_rank_step_double(request) : low_rank_step()(request);
  STD_TORCH_CHECK(done, "low_rank_adam_step: out of memory");
}

// The elements are visited in the order of memory, so all four tensors must lie alike, without gaps.
void check_layout(const Tensor& param, const Tensor& other, const char* name) {
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

void run_adam(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
              const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
              bool decay_after, bool corrected_eps, bool maximize) {
  lowrank::AdamStep request{};
  check_cpu(param, "param");
  check_cpu(grad, "grad");
  request.type = data_type(param, "param");
  check_type(grad, param.scalar_type(), "grad");
  check_moment(exp_avg, request.type, "exp_avg");
  check_moment(exp_avg_sq, request.type, "exp_avg_sq");
  request.size = param.numel();
  if (request.size > 0) {
    check_layout(param, grad, "grad");
    check_layout(param, exp_avg, "exp_avg");
    check_layout(param, exp_avg_sq, "exp_avg_sq");
  }
  request.rule = next_rule(step, lr, beta1, beta2, eps, weight_decay, decay_after, corrected_eps, maximize);
  request.param = param.mutable_data_ptr();
  request.grad = grad.const_data_ptr();
  request.exp_avg = exp_avg.mutable_data_ptr();
  request.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
  if (request.type == DataType::f64) {
    lowrank::adam_step_double(request);
  } else {
    adam_step()(request);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("low_rank_adam_step", TORCH_BOX(&run_low_rank));
  m.impl("adam_step", TORCH_BOX(&run_adam));
}

}  // namespace pykern
