// Host side of the whole low-rank step on CUDA: the parts one after the other on the stream, a few launches for all
// matrices; the host waits for nothing.
#include "common/products.h"
#include "lowrank/cuda_parts.h"
#include "lowrank/cuda_rule.h"
#include "lowrank/step_arguments.h"

namespace pykern {
namespace {

using lowrank::OptionalTensor;
using lowrank::Tensors;

// One piece of memory for all that lies between the parts: an allocation for each of hundreds of matrices would take
// the host longer than the step takes the device.
class Workspace {
 public:
  Workspace(const Tensor& like, ScalarType type, int64_t elements)
      : type_(type), memory_(cuda::empty(like, {elements}, type)) {}

  // What a tensor of these sizes takes, in elements: neighbours begin at multiples of 256 bytes.
  static int64_t padded(int64_t elements) { return (elements + 63) / 64 * 64; }

  Tensor matrix(int64_t rows, int64_t columns) { return take({rows, columns}, {columns, 1}, rows * columns); }
  Tensor line(int64_t length) { return take({length}, {1}, length); }

 private:
  Tensor take(torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::IntHeaderOnlyArrayRef strides,
              int64_t elements) {
    char* begin = static_cast<char*>(memory_.mutable_data_ptr()) + used_ * memory_.element_size();
    used_ += padded(elements);
    return torch::stable::from_blob(begin, sizes, strides, memory_.device(), type_);
  }

  const ScalarType type_;
  const Tensor memory_;
  int64_t used_ = 0;
};

enum class Residual : int64_t { none, fira, apollo_channel, apollo_tensor };

// P^T P R of each matrix, by the vendor's products.
Tensors grams(const Tensors& projector, const Tensors& low) {
  Tensors result;
  result.reserve(low.size());
  for (size_t i = 0; i < low.size(); ++i) {
    const int64_t rank = low[i].size(0);
    const Tensor gram = cuda::empty(low[i], {rank, rank}, low[i].scalar_type());
    result.push_back(cuda::empty(low[i], low[i].sizes(), low[i].scalar_type()));
    if (low[i].numel() == 0) continue;
    cuda::multiply(cuda::transposed(projector[i]), projector[i], gram);
    cuda::multiply(gram, low[i], result[i]);
  }
  return result;
}

void run_step(Tensors param, Tensors grad, Tensors projector, Tensors exp_avg, Tensors exp_avg_sq, Tensors step,
              Tensors residual_norm, Tensor lr, OptionalTensor grad_scale, OptionalTensor found_inf, double beta1,
              double beta2, double eps, bool corrected_eps, double weight_decay, bool decay_after, double scale,
              int64_t residual, double removed, double growth, bool zero_norm_limits, double amplitude,
              bool amplitude_first, bool orthonormal, bool maximize) {
  lowrank::check_low_rank_adamw(param, grad, projector, exp_avg, exp_avg_sq, step, residual_norm, lr, grad_scale,
                                found_inf, residual, cuda::check_device);
  if (param.empty()) return;
  const cuda::DeviceGuard guard(param[0]);
  const Stream stream = cuda::current_stream(param[0]);
  const auto kind = static_cast<Residual>(residual);
  const bool measured = kind != Residual::none, up = kind == Residual::none || kind == Residual::fira;
  const ScalarType wide = lowrank::moment_type(data_type(param[0], "param"));
  const auto count = static_cast<int64_t>(param.size());

  int64_t elements = 0;
  for (size_t i = 0; i < param.size(); ++i) {
    elements += 2 * Workspace::padded(projector[i].size(1) * param[i].size(1));
    if (measured) elements += 2 * Workspace::padded(param[i].size(1));
  }
  Workspace workspace(param[0], wide, elements);
  Tensors low, direction, squares, ratios;
  for (size_t i = 0; i < param.size(); ++i) {
    const int64_t rank = projector[i].size(1), length = param[i].size(1);
    low.push_back(workspace.matrix(rank, length));
    direction.push_back(workspace.matrix(rank, length));
    if (!measured) continue;
    squares.push_back(workspace.line(length));
    ratios.push_back(workspace.line(length));
  }

  const Tensor step_factor = cuda::empty(param[0], {count}, ScalarType::Double);
  lowrank::ResolveParams resolve{};
  resolve.found_inf = cuda::input<float>(found_inf);
  resolve.beta1 = beta1;
  resolve.beta2 = beta2;
  resolve.eps = eps;
  resolve.corrected_eps = corrected_eps;
  resolve.adaptive = true;
  resolve.step_factor = cuda::output<double>(step_factor);
  const Tensor rules = lowrank::resolve(resolve, step, stream);
  const Tensor split_sums = lowrank::project(grad, projector, grad_scale, low, squares, maximize, stream);

  lowrank::RuleParams rule{};
  rule.type = data_type(low[0], "low");
  rule.storage = lowrank::MomentStorage::wide;
  rule.rule = lowrank::InnerRule::adamw;
  rule.found_inf = resolve.found_inf;
  lowrank::apply_rule(rule, resolve.rules, low, exp_avg, exp_avg_sq, {}, {}, direction, stream);

  // The memory of the parts lives until the last of them is launched.
  lowrank::RatioParams measure{};
  measure.type = rule.type;
  measure.grad_scale = cuda::input<float>(grad_scale);
  measure.found_inf = resolve.found_inf;
  measure.scale = scale;
  measure.removed = removed;
  measure.amplitude = amplitude;
  measure.growth = growth;
  measure.removes = up;
  measure.per_tensor = kind == Residual::apollo_tensor;
  measure.amplitude_first = amplitude_first;
  measure.zero_norm_limits = zero_norm_limits;
  measure.maximize = maximize;
  const Tensor sums = cuda::empty(param[0], {measured ? count : 0, 3}, ScalarType::Double);
  const Tensors low_gram = kind == Residual::fira && !orthonormal ? grams(projector, low) : Tensors();
  lowrank::Ratios ratios_of(measure, low, stream);
  if (measured) {
    ratios_of.measure(low, direction, squares, low_gram, ratios);
    ratios_of.limit(low, direction, ratios, sums, residual_norm);
  }

  const Tensors none;
  const std::vector<int64_t> seeds(param.size(), 0);
  lowrank::apply({param, up ? projector : none, up ? direction : none, measured ? grad : none, ratios, none, none, step,
                  seeds, step_factor, lr, grad_scale, found_inf, measured ? 1.0 : scale, weight_decay, 0.0, decay_after,
                  maximize, lowrank::Rounding::nearest},
                 stream);
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("low_rank_adamw_step", TORCH_BOX(&run_step)); }

}  // namespace pykern
