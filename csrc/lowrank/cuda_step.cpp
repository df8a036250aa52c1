// Host side of the low-rank step on CUDA: vendor products around hand-written kernels, launched one after the
// other on the stream; the host waits for nothing.
//
// The direction is projected up into a matrix of the weight's size and type, the one temporary of that size;
// with a residual it serves G's part too, which the last kernel adds as it reads G a second time.
#include "common/cuda.h"
#include "kernels/lowrank/residual.h"
#include "kernels/lowrank/update.h"
#include "lowrank/arguments.h"
#include "lowrank/cuda_rule.h"

namespace pykern {
namespace {

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Tensor product(const Tensor& left, const Tensor& right) {
  Tensor result = torch::stable::matmul(left, right);
  STD_TORCH_CHECK(result.scalar_type() == left.scalar_type(),
                  "low_rank_adam_step: autocast changes the dtype of its products; take the step outside of it");
  check_contiguous(result, "low_rank_adam_step: product");
  return result;
}

struct Step {
  Tensor param, grad, projector, exp_avg, exp_avg_sq;
  bool right;
  double scale, removed;
  bool zero_norm_limits;
  lowrank::AdamRule* rule;
  Stream stream;

  Tensor project() const { return right ? product(grad, projector) : product(transposed(projector), grad); }
  Tensor project_up(const Tensor& low) const {
    return right ? product(low, transposed(projector)) : product(projector, low);
  }
  DataType type() const { return data_type(param, "param"); }
  int64_t lines() const { return right ? param.size(0) : param.size(1); }

  lowrank::WeightUpdateParams update_params(const Tensor& update) const {
    lowrank::WeightUpdateParams params{};
    params.type = type();
    params.rows = param.size(0);
    params.columns = param.size(1);
    params.rule = rule;
    params.param = cuda::output<void>(param);
    params.param_stride = param.stride(0);
    params.update = cuda::input<void>(update);
    params.scale = 1.0;
    return params;
  }

  void without_residual() const {
    const Tensor low = project();
    const Tensor direction = cuda::empty(low, low.sizes(), low.scalar_type());
    lowrank::AdamParams adam{};
    adam.type = type();
    adam.size = low.numel();
    adam.rule = rule;
    adam.grad = cuda::input<void>(low);
    adam.exp_avg = cuda::output<void>(exp_avg);
    adam.exp_avg_sq = cuda::output<void>(exp_avg_sq);
    adam.target = cuda::output<void>(direction);
    cuda::check_launch(lowrank::launch_adam(adam, stream), "low_rank_adam_step");

    const Tensor update = project_up(direction);
    lowrank::WeightUpdateParams weights = update_params(update);
    weights.scale = scale;
    cuda::check_launch(lowrank::launch_weight_update(weights, stream), "low_rank_adam_step");
  }

  void with_residual(const Tensor& residual_norm) const {
    const Tensor low = project();
    const Tensor gram = product(transposed(projector), projector);
    const Tensor low_gram = right ? product(low, gram) : product(gram, low);
    const Tensor combined = cuda::empty(low, low.sizes(), low.scalar_type());
    const ScalarType wide = lowrank::moment_type(type());
    const Tensor parts = cuda::empty(low, {lowrank::square_parts(right, param.size(0)), lines()}, wide);
    const Tensor factors = cuda::empty(low, {lines()}, wide);
    const Tensor low_squares = cuda::empty(low, {lines()}, wide), gram_squares = cuda::empty(low, {lines()}, wide);
    const Tensor sums = cuda::empty(low, {lowrank::line_blocks(lines())}, ScalarType::Double);

    lowrank::ResidualParams residual{};
    residual.type = type();
    residual.right = right;
    residual.rows = param.size(0);
    residual.columns = param.size(1);
    residual.rank = projector.size(1);
    residual.rule = rule;
    residual.grad = cuda::input<void>(grad);
    residual.grad_stride = grad.stride(0);
    residual.low = cuda::input<void>(low);
    residual.low_gram = cuda::input<void>(low_gram);
    residual.exp_avg = cuda::output<void>(exp_avg);
    residual.exp_avg_sq = cuda::output<void>(exp_avg_sq);
    residual.combined = cuda::output<void>(combined);
    residual.square_parts = cuda::workspace<void>(parts);
    residual.factors = cuda::output<void>(factors);
    residual.low_squares = cuda::workspace<void>(low_squares);
    residual.gram_squares = cuda::workspace<void>(gram_squares);
    residual.block_sums = cuda::workspace<double>(sums);
    residual.residual_norm = cuda::output<void>(residual_norm);
    residual.scale = scale;
    residual.removed = removed;
    residual.zero_norm_limits = zero_norm_limits;
    cuda::check_launch(lowrank::launch_residual(residual, stream), "low_rank_adam_step");

    const Tensor update = project_up(combined);
    lowrank::WeightUpdateParams weights = update_params(update);
    weights.grad = residual.grad;
    weights.grad_stride = residual.grad_stride;
    weights.factors = residual.factors;
    weights.factor_per_row = right;
    cuda::check_launch(lowrank::launch_weight_update(weights, stream), "low_rank_adam_step");
  }
};

void run_low_rank(const Tensor& param, const Tensor& grad, const Tensor& projector, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const Tensor& step, const std::optional<Tensor>& residual_norm,
                  const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, double scale,
                  bool right, bool decay_after, bool corrected_eps, bool scaled_residual, bool maximize) {
  lowrank::check_low_rank(param, grad, projector, exp_avg, exp_avg_sq, step, residual_norm, lr, right,
                          cuda::check_device);
  const cuda::DeviceGuard guard(param);
  const Stream stream = cuda::current_stream(param);
  const Tensor rule = lowrank::new_rule(param);
  lowrank::AdamRuleParams resolve = lowrank::rule_params(rule, step, &lr, beta1, beta2, eps, weight_decay, decay_after,
                                                         corrected_eps, maximize);
  resolve.residual_norm = cuda::input<void>(residual_norm);
  resolve.norm_is_double = residual_norm && lowrank::is_double(*residual_norm);
  cuda::check_launch(lowrank::launch_adam_rule(resolve, stream), "low_rank_adam_step");
  if (param.numel() == 0) return;

  const Step work{param, grad,  projector, exp_avg, exp_avg_sq,
                  right, scale, scaled_residual ? scale : 1.0, scaled_residual, resolve.rule, stream};
  if (residual_norm) {
    work.with_residual(*residual_norm);
  } else {
    work.without_residual();
  }
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("low_rank_adam_step", TORCH_BOX(&run_low_rank)); }

}  // namespace pykern
