// Host side of Adam on CUDA: over whole parameters, and in the subspace alone.
#include "common/cuda.h"
#include "kernels/lowrank/adam.h"
#include "kernels/lowrank/dynamic_map.h"
#include "lowrank/arguments.h"
#include "lowrank/cuda_rule.h"

namespace pykern {
namespace {

using lowrank::AdamRule;

void run_adam(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
              const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
              bool decay_after, bool corrected_eps, bool maximize) {
  lowrank::check_adam(param, grad, exp_avg, exp_avg_sq, step, lr, cuda::check_device);
  const cuda::DeviceGuard guard(param);
  const Stream stream = cuda::current_stream(param);
  const Tensor rule = lowrank::new_rule(param);
  const lowrank::AdamRuleParams resolve = lowrank::rule_params(rule, step, &lr, beta1, beta2, eps, weight_decay,
                                                               decay_after, corrected_eps, maximize);
  cuda::check_launch(lowrank::launch_adam_rule(resolve, stream), "adam_step");
  if (param.numel() == 0) return;

  lowrank::AdamParams params{};
  params.type = data_type(param, "param");
  params.size = param.numel();
  params.rule = resolve.rule;
  params.grad = cuda::input<void>(grad);
  params.exp_avg = cuda::output<void>(exp_avg);
  params.exp_avg_sq = cuda::output<void>(exp_avg_sq);
  params.target = cuda::output<void>(param);
  params.updates_weights = true;
  cuda::check_launch(lowrank::launch_adam(params, stream), "adam_step");
}

Tensor run_phase(const Tensor& low, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                 const std::optional<Tensor>& exp_avg_scale, const std::optional<Tensor>& exp_avg_sq_scale,
                 const Tensor& step, double beta1, double beta2, double eps, bool corrected_eps, bool maximize) {
  const auto blocks = [](int64_t length) { return lowrank::quant_blocks(length); };
  const bool quantised = lowrank::check_phase(low, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, step, blocks,
                                              cuda::check_device);
  const cuda::DeviceGuard guard(low);
  const Stream stream = cuda::current_stream(low);
  const Tensor direction = cuda::empty(low, low.sizes(), low.scalar_type());
  const Tensor rule = lowrank::new_rule(low);
  const lowrank::AdamRuleParams resolve =
      lowrank::rule_params(rule, step, nullptr, beta1, beta2, eps, 0.0, false, corrected_eps, maximize);
  cuda::check_launch(lowrank::launch_adam_rule(resolve, stream), "low_rank_adam_phase");
  if (low.numel() == 0) return direction;

  const DataType type = data_type(low, "low");
  if (quantised) {
    lowrank::Adam8BitParams params{};
    params.type = type;
    params.rank = low.size(0);
    params.length = low.size(1);
    params.rule = resolve.rule;
    params.low = cuda::input<void>(low);
    params.exp_avg = cuda::output<uint8_t>(exp_avg);
    params.exp_avg_sq = cuda::output<uint8_t>(exp_avg_sq);
    params.exp_avg_scale = cuda::output<float>(*exp_avg_scale);
    params.exp_avg_sq_scale = cuda::output<float>(*exp_avg_sq_scale);
    params.direction = cuda::output<void>(direction);
    cuda::check_launch(lowrank::launch_adam_8bit(params, stream), "low_rank_adam_phase");
    return direction;
  }
  lowrank::AdamParams params{};
  params.type = type;
  params.size = low.numel();
  params.rule = resolve.rule;
  params.grad = cuda::input<void>(low);
  params.exp_avg = cuda::output<void>(exp_avg);
  params.exp_avg_sq = cuda::output<void>(exp_avg_sq);
  params.target = cuda::output<void>(direction);
  params.applies_step_size = true;
  cuda::check_launch(lowrank::launch_adam(params, stream), "low_rank_adam_phase");
  return direction;
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("adam_step", TORCH_BOX(&run_adam));
  m.impl("low_rank_adam_phase", TORCH_BOX(&run_phase));
}

}  // namespace pykern
