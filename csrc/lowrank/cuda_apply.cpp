// The change of the weights on CUDA. bfloat16 and float16 need no temporary of a weight's size, nor do projectors that
// pick rows; for float32 and float64 the vendor's product, with TF32 where torch is told to use it, projects a
// direction up into one before a kernel of ours changes the weight.
#include "common/products.h"
#include "kernels/lowrank/apply.h"
#include "lowrank/cuda_parts.h"

namespace pykern {
namespace lowrank {
namespace {

// P low, in memory as the weight: its unit stride along the same axis, without gaps.
Tensor projected_up(const Tensor& projector, const Tensor& low, bool along_length) {
  const int64_t n = projector.size(0), length = low.size(1);
  const Tensor up = along_length ? cuda::empty(low, {n, length}, low.scalar_type())
                                 : cuda::empty(low, {length, n}, low.scalar_type());
  if (along_length) {
    cuda::multiply(projector, low, up);
  } else {
    cuda::multiply(cuda::transposed(low), cuda::transposed(projector), up);
  }
  return up;
}

// The gradient, or a copy that lies in memory as the weight.
Tensor aligned_gradient(const Tensor& grad, const MatrixLayout& layout) {
  if (grad.stride(layout.along_length ? 1 : 0) == 1) return grad;
  return layout.along_length ? torch::stable::contiguous(grad)
                             : cuda::transposed(torch::stable::contiguous(cuda::transposed(grad)));
}

}  // namespace

void apply(const Application& given, Stream stream) {
  if (given.param.empty()) return;
  const DataType type = data_type(given.param[0], "param");
  const bool picks = picks_rows(given.projector);
  const bool by_vendor = (type == DataType::f32 || type == DataType::f64) && !given.projector.empty() && !picks;
  const double* factors = cuda::input<double>(given.step_factor);
  ApplyParams params{};
  params.type = type;
  params.count = 1;
  params.rule = {cuda::input(given.lr),
                 is_double(given.lr),
                 cuda::input<float>(given.grad_scale),
                 cuda::input<float>(given.found_inf),
                 given.scale,
                 given.weight_decay,
                 given.sign_scale,
                 given.decay_after,
                 given.maximize,
                 static_cast<WeightRounding>(given.rounding)};
  std::vector<ApplyMatrix> matrices(given.param.size());
  std::vector<Tensor> gradients;  // copies live until their launch
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& param = given.param[i];
    const MatrixLayout layout = matrix_layout(param, "param");
    ApplyMatrix& m = matrices[i];
    m.param = cuda::output(param);
    m.n = checked_size(param.size(0), "param");
    m.length = checked_size(param.size(1), "param");
    m.param_stride = layout.stride;
    m.along_length = layout.along_length;
    m.step = cuda::input<float>(given.step[i]);
    m.step_factor = factors + i;
    m.seed = static_cast<uint64_t>(given.seeds[i]);
    if (!given.grad.empty()) {
      gradients.push_back(aligned_gradient(given.grad[i], layout));
      m.grad = cuda::input(gradients.back());
      m.grad_stride = gradients.back().stride(layout.along_length ? 0 : 1);
    }
    if (!given.factors.empty()) m.factors = cuda::input(given.factors[i]);
    if (!given.compensation.empty()) m.compensation = cuda::output(given.compensation[i]);
    if (!given.projector.empty()) {
      m.projector = cuda::input(given.projector[i]);
      m.rank = checked_size(rank_of(given.projector[i]), "projector");
    }
    if (by_vendor) {
      // One weight at a time, so that there is one temporary.
      if (param.numel() == 0) continue;
      Tensor direction, low;
      if (!given.direction.empty()) {
        direction = projected_up(given.projector[i], given.direction[i], layout.along_length);
        m.direction = cuda::input(direction);
      }
      if (!given.low.empty()) {
        low = projected_up(given.projector[i], given.low[i], layout.along_length);
        m.low = cuda::input(low);
      }
      params.matrices = &m;
      cuda::check_launch(launch_apply(params, stream), "low_rank_apply");
      gradients.clear();
      continue;
    }
    if (!given.direction.empty()) m.direction = cuda::input(given.direction[i]);
    if (!given.low.empty()) m.low = cuda::input(given.low[i]);
  }
  if (by_vendor) return;
  params.count = static_cast<int64_t>(matrices.size());
  params.matrices = matrices.data();
  cuda::check_launch(picks ? launch_apply_rows(params, stream) : launch_apply(params, stream), "low_rank_apply");
}

}  // namespace lowrank

namespace {

void run_apply(std::vector<Tensor> param, std::vector<Tensor> projector, std::vector<Tensor> direction,
               std::vector<Tensor> grad, std::vector<Tensor> factors, std::vector<Tensor> low,
               std::vector<Tensor> compensation, std::vector<Tensor> step, std::vector<int64_t> seeds,
               Tensor step_factor, Tensor lr, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
               double scale, double weight_decay, bool decay_after, double sign_scale, int64_t rounding,
               bool maximize) {
  lowrank::check_apply(param, projector, direction, grad, factors, low, compensation, step, seeds, step_factor, lr,
                       grad_scale, found_inf, rounding, cuda::check_device);
  if (param.empty()) return;
  const cuda::DeviceGuard guard(param[0]);
  const lowrank::Application given{param,        projector,  direction,   grad,
                                   factors,      low,        compensation, step,
                                   seeds,        step_factor, lr,          grad_scale,
                                   found_inf,    scale,      weight_decay, sign_scale,
                                   decay_after,  maximize,   static_cast<lowrank::Rounding>(rounding)};
  lowrank::apply(given, cuda::current_stream(param[0]));
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("low_rank_apply", TORCH_BOX(&run_apply)); }

}  // namespace pykern
