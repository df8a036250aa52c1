// Host side of activation functions and dropout on a GPU.
#include <optional>
#include <tuple>

#include "common/cuda.h"
#include "offload/pointwise_arguments.h"

namespace pykern {
namespace {

void run(const Tensor& gate, const ActivationParams& params, const char* op) {
  if (params.count == 0) return;
  cuda::check_launch(launch_activation(data_type(gate, "gate"), params, cuda::current_stream(gate)), op);
}

Tensor activation(Tensor gate, std::optional<Tensor> up, int64_t kind) {
  const Activation function = check_activation(gate, up, kind, cuda::check_device);
  const cuda::DeviceGuard guard(gate);
  Tensor y = cuda::empty(gate, gate.sizes(), gate.scalar_type());
  run(gate, {cuda::input(gate), cuda::input(up), nullptr, cuda::output(y), nullptr, gate.numel(), function},
      "activation");
  return y;
}

std::tuple<Tensor, Tensor> activation_backward(Tensor grad, Tensor gate, std::optional<Tensor> up, int64_t kind) {
  const Activation function = check_activation(gate, up, kind, cuda::check_device);
  check_like(grad, gate, "grad", cuda::check_device);
  const cuda::DeviceGuard guard(gate);
  Tensor grad_gate = cuda::empty(gate, gate.sizes(), gate.scalar_type());
  Tensor grad_up = cuda::empty(gate, {0}, gate.scalar_type());
  if (up) grad_up = cuda::empty(gate, gate.sizes(), gate.scalar_type());
  run(gate,
      {cuda::input(gate), cuda::input(up), cuda::input(grad), cuda::output(grad_gate),
       up ? cuda::output(grad_up) : nullptr, gate.numel(), function},
      "activation_backward");
  return {grad_gate, grad_up};
}

Tensor seeded_dropout(Tensor x, Tensor seed, double p) {
  const DropoutRule rule = check_dropout(x, seed, p, cuda::check_device);
  const cuda::DeviceGuard guard(x);
  Tensor y = cuda::empty(x, x.sizes(), x.scalar_type());
  if (x.numel() == 0) return y;
  const DropoutParams params{cuda::input(x), cuda::output(y), cuda::input<int64_t>(seed), x.numel(), rule.threshold,
                             static_cast<float>(rule.scale)};
  cuda::check_launch(launch_dropout(data_type(x, "x"), params, cuda::current_stream(x)), "seeded_dropout");
  return y;
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("seeded_dropout", TORCH_BOX(&seeded_dropout));
}

}  // namespace pykern
