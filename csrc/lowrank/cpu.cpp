// Host side of the optimizer steps on the CPU.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "lowrank/arguments.h"
#include "lowrank/rule.h"
#include "lowrank/step.h"

namespace pykern {
namespace {

void run_low_rank(const Tensor& param, const Tensor& grad, const Tensor& projector, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const Tensor& step, const std::optional<Tensor>& residual_norm,
                  const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, double scale,
                  bool right, bool decay_after, bool corrected_eps, bool scaled_residual, bool maximize) {
  lowrank::LowRankStep request{};
  lowrank::check_low_rank(param, grad, projector, exp_avg, exp_avg_sq, step, residual_norm, lr, right, check_cpu);
  request.type = data_type(param, "param");
  request.rows = param.size(0);
  request.columns = param.size(1);
  request.rank = projector.size(1);
  request.right = right;
  if (residual_norm) request.residual_norm = residual_norm->mutable_data_ptr();
  request.rule = lowrank::next_rule(step, lowrank::number(lr), beta1, beta2, eps, weight_decay, decay_after,
                                    corrected_eps, maximize);
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

void run_adam(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
              const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
              bool decay_after, bool corrected_eps, bool maximize) {
  lowrank::AdamStep request{};
  lowrank::check_adam(param, grad, exp_avg, exp_avg_sq, step, lr, check_cpu);
  request.type = data_type(param, "param");
  request.size = param.numel();
  request.rule = lowrank::next_rule(step, lowrank::number(lr), beta1, beta2, eps, weight_decay, decay_after,
                                    corrected_eps, maximize);
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
