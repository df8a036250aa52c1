// Host side of plain AdamW on CUDA.
#include "lowrank/cuda_rule.h"
#include "lowrank/step_arguments.h"

namespace pykern {
namespace {

using lowrank::OptionalTensor;
using lowrank::Tensors;

void run_adamw(Tensors param, Tensors grad, Tensors exp_avg, Tensors exp_avg_sq, Tensors step, Tensor lr,
               OptionalTensor grad_scale, OptionalTensor found_inf, double beta1, double beta2, double eps,
               double weight_decay, bool decay_after, bool corrected_eps, bool maximize) {
  lowrank::check_adamw(param, grad, exp_avg, exp_avg_sq, step, lr, grad_scale, found_inf, cuda::check_device);
  if (param.empty()) return;
  const cuda::DeviceGuard guard(param[0]);
  const Stream stream = cuda::current_stream(param[0]);

  lowrank::ResolveParams resolve{};
  resolve.grad_scale = cuda::input<float>(grad_scale);
  resolve.found_inf = cuda::input<float>(found_inf);
  resolve.lr = cuda::input(lr);
  resolve.lr_is_double = lowrank::is_double(lr);
  resolve.beta1 = beta1;
  resolve.beta2 = beta2;
  resolve.eps = eps;
  resolve.weight_decay = weight_decay;
  resolve.decay_after = decay_after;
  resolve.corrected_eps = corrected_eps;
  resolve.maximize = maximize;
  resolve.adaptive = true;
  const Tensor rules = lowrank::resolve(resolve, step, stream);

  std::vector<lowrank::AdamWTensor> tensors(param.size());
  for (size_t i = 0; i < param.size(); ++i) {
    lowrank::AdamWTensor& tensor = tensors[i];
    tensor.rule = resolve.rules + i;
    tensor.param = cuda::output(param[i]);
    tensor.grad = cuda::input(grad[i]);
    tensor.exp_avg = cuda::output(exp_avg[i]);
    tensor.exp_avg_sq = cuda::output(exp_avg_sq[i]);
    tensor.size = param[i].numel();
  }
  const lowrank::AdamWParams params{data_type(param[0], "param"), resolve.found_inf};
  cuda::check_launch(lowrank::launch_adamw(params, tensors.data(), static_cast<int64_t>(tensors.size()), stream),
                     "adamw_step");
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("adamw_step", TORCH_BOX(&run_adamw)); }

}  // namespace pykern
