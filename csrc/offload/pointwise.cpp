// Host side of activation functions and dropout on the CPU. Float64 goes through plain loops: it serves gradient
// checks, not speed.
#include "offload/pointwise.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "common/parallel.h"
#include "common/scratch.h"
#include "kernels/common/philox.h"
#include "offload/pointwise_arguments.h"

namespace pykern {
namespace {

constexpr int64_t kTaskElements = 32768;

template <class Body>
void for_tasks(int64_t count, const Body& body) {
  parallel_tasks(ceil_div(count, kTaskElements), [&](int64_t task, int) {
    body(task * kTaskElements, std::min(count, (task + 1) * kTaskElements));
  });
}

struct Terms {
  double value, slope;
};

Terms terms_f64(Activation kind, double x) {
  if (kind == Activation::gelu) {
    const double below = 0.5 * std::erfc(-x * std::sqrt(0.5));
    return {x * below, below + x * std::exp(-0.5 * x * x) * 0.5 * M_2_SQRTPI * std::sqrt(0.5)};
  }
  const double factor = kind == Activation::silu ? 0 : 2 * M_2_SQRTPI * std::sqrt(0.5);
  const double inner = kind == Activation::silu ? x : factor * (x + 0.044715 * x * x * x);
  const double inner_slope = kind == Activation::silu ? 1 : factor * (1 + 3 * 0.044715 * x * x);
  const double share = 1 / (1 + std::exp(-inner));
  return {x * share, share * (1 + x * (1 - share) * inner_slope)};
}

void activation_f64(const ActivationParams& p) {
  const auto at = [](const void* data, int64_t i) { return data ? static_cast<const double*>(data)[i] : 1.0; };
  for (int64_t i = 0; i < p.count; ++i) {
    const Terms terms = terms_f64(p.kind, at(p.gate, i));
    static_cast<double*>(p.gate_out)[i] = (p.grad ? at(p.grad, i) * terms.slope : terms.value) * at(p.up, i);
    if (p.grad && p.up) static_cast<double*>(p.up_out)[i] = at(p.grad, i) * terms.value;
  }
}

void run(const Tensor& gate, const ActivationParams& params) {
  const DataType type = data_type(gate, "gate");
  if (type == DataType::f64) return activation_f64(params);
  for_tasks(params.count, [&](int64_t begin, int64_t end) { activation_elements()(type, params, begin, end); });
}

Tensor activation(Tensor gate, std::optional<Tensor> up, int64_t kind) {
  const Activation function = check_activation(gate, up, kind, check_cpu);
  Tensor y = torch::stable::empty_like(gate);
  run(gate, {gate.const_data_ptr(), up ? up->const_data_ptr() : nullptr, nullptr, y.mutable_data_ptr(), nullptr,
             gate.numel(), function});
  return y;
}

std::tuple<Tensor, Tensor> activation_backward(Tensor grad, Tensor gate, std::optional<Tensor> up, int64_t kind) {
  const Activation function = check_activation(gate, up, kind, check_cpu);
  check_like(grad, gate, "grad", check_cpu);
  Tensor grad_gate = torch::stable::empty_like(gate);
  Tensor grad_up = up ? torch::stable::empty_like(gate) : torch::stable::new_empty(gate, {0});
  run(gate, {gate.const_data_ptr(), up ? up->const_data_ptr() : nullptr, grad.const_data_ptr(),
             grad_gate.mutable_data_ptr(), up ? grad_up.mutable_data_ptr() : nullptr, gate.numel(), function});
  return {grad_gate, grad_up};
}

Tensor seeded_dropout(Tensor x, Tensor seed, double p) {
  const DropoutRule rule = check_dropout(x, seed, p, check_cpu);
  Tensor y = torch::stable::empty_like(x);
  const DataType type = data_type(x, "x");
  if (type == DataType::f64) {
    const double* from = input<double>(x);
    double* to = output<double>(y);
    const uint64_t key = static_cast<uint64_t>(*input<int64_t>(seed));
    for (int64_t i = 0; i < x.numel(); ++i) {
      const PhiloxBits bits = philox(key, static_cast<uint64_t>(i / 4), 0);
      to[i] = bits.words[i % 4] >= rule.threshold ? from[i] * rule.scale : 0;
    }
    return y;
  }
  const DropoutParams params{x.const_data_ptr(), y.mutable_data_ptr(), input<int64_t>(seed), x.numel(), rule.threshold,
                             static_cast<float>(rule.scale)};
  for_tasks(params.count, [&](int64_t begin, int64_t end) { dropout_elements()(type, params, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
  m.impl("seeded_dropout", TORCH_BOX(&seeded_dropout));
}

}  // namespace pykern
