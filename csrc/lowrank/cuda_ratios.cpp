// Host side of the residual's factors and their limit on CUDA.
#include "lowrank/cuda_rule.h"

namespace pykern {
namespace lowrank {

Ratios::Ratios(const RatioParams& params, const Tensors& low, Stream stream)
    : params_(params), stream_(stream), matrices_(low.size()) {
  for (size_t i = 0; i < low.size(); ++i) {
    matrices_[i].low = cuda::input(low[i]);
    matrices_[i].rank = low[i].size(0);
    matrices_[i].length = low[i].size(1);
  }
}

void Ratios::measure(const Tensors& low, const Tensors& direction, const Tensors& squares, const Tensors& low_gram,
                     const Tensors& ratios) {
  int64_t total = 0;
  for (const RatioMatrix& matrix : matrices_) total += strips(params_.type, matrix.length);
  strip_sums_ = cuda::empty(low[0], {total, 3}, ScalarType::Double);
  double* strip_sums = cuda::workspace<double>(*strip_sums_);
  for (size_t i = 0; i < matrices_.size(); ++i) {
    RatioMatrix& matrix = matrices_[i];
    matrix.low_gram = low_gram.empty() ? nullptr : cuda::input(low_gram[i]);
    // Read only; launch_limit alone writes it, through the list of its own call.
    matrix.direction = const_cast<void*>(cuda::input(direction[i]));
    matrix.squares = cuda::input(squares[i]);
    matrix.ratios = cuda::output(ratios[i]);
    matrix.strip_sums = strip_sums;
    strip_sums += 3 * strips(params_.type, matrix.length);
  }
  const int64_t count = static_cast<int64_t>(matrices_.size());
  cuda::check_launch(launch_ratios(params_, matrices_.data(), count, stream_), "low_rank_ratios");
}

void Ratios::set_sums(double* sums) {
  for (size_t i = 0; i < matrices_.size(); ++i) matrices_[i].sums = sums + 3 * i;
}

void Ratios::add_up(const Tensor& sums) {
  set_sums(cuda::output<double>(sums));
  const int64_t count = static_cast<int64_t>(matrices_.size());
  cuda::check_launch(launch_ratio_sums(params_, matrices_.data(), count, stream_), "low_rank_ratios");
}

void Ratios::limit(const Tensors& low, const Tensors& direction, const Tensors& ratios, const Tensor& sums,
                   const Tensors& residual_norm) {
  const bool measured = strip_sums_.has_value();
  set_sums(measured ? cuda::output<double>(sums) : const_cast<double*>(cuda::input<double>(sums)));
  limits_ = cuda::empty(low[0], {static_cast<int64_t>(low.size())}, ScalarType::Double);
  double* limits = cuda::workspace<double>(*limits_);
  for (size_t i = 0; i < matrices_.size(); ++i) {
    RatioMatrix& matrix = matrices_[i];
    matrix.direction = cuda::output(direction[i]);
    matrix.ratios = cuda::output(ratios[i]);
    matrix.residual_norm = residual_norm.empty() ? nullptr : cuda::output(residual_norm[i]);
    matrix.limit = limits + i;
  }
  const int64_t count = static_cast<int64_t>(matrices_.size());
  cuda::check_launch(launch_limiter(params_, matrices_.data(), count, measured, stream_), "low_rank_limit");
  cuda::check_launch(launch_limit(params_, matrices_.data(), count, stream_), "low_rank_limit");
}

}  // namespace lowrank

namespace {

using lowrank::OptionalTensor;
using lowrank::Tensors;

void run_ratios(Tensors low, Tensors direction, Tensors squares, Tensors low_gram, Tensors ratios, Tensor sums,
                bool per_tensor, std::optional<double> removed) {
  lowrank::check_ratios(low, direction, squares, low_gram, ratios, sums, cuda::check_device);
  if (low.empty()) return;
  const cuda::DeviceGuard guard(low[0]);
  lowrank::RatioParams params{};
  params.type = data_type(low[0], "low");
  params.removes = removed.has_value();
  params.removed = removed.value_or(0.0);
  params.per_tensor = per_tensor;
  lowrank::Ratios work(params, low, cuda::current_stream(low[0]));
  work.measure(low, direction, squares, low_gram, ratios);
  work.add_up(sums);
}

void run_limit(Tensors low, Tensors direction, Tensors ratios, Tensor sums, Tensors residual_norm,
               OptionalTensor grad_scale, OptionalTensor found_inf, double scale, std::optional<double> removed,
               bool per_tensor, double amplitude, bool amplitude_first, double growth, bool zero_norm_limits,
               bool maximize) {
  lowrank::check_limit(low, direction, ratios, sums, residual_norm, grad_scale, found_inf, cuda::check_device);
  if (low.empty()) return;
  const cuda::DeviceGuard guard(low[0]);
  lowrank::RatioParams params{};
  params.type = data_type(low[0], "low");
  params.grad_scale = cuda::input<float>(grad_scale);
  params.found_inf = cuda::input<float>(found_inf);
  params.scale = scale;
  params.removed = removed.value_or(0.0);
  params.amplitude = amplitude;
  params.growth = growth;
  params.removes = removed.has_value();
  params.per_tensor = per_tensor;
  params.amplitude_first = amplitude_first;
  params.zero_norm_limits = zero_norm_limits;
  params.maximize = maximize;
  lowrank::Ratios work(params, low, cuda::current_stream(low[0]));
  work.limit(low, direction, ratios, sums, residual_norm);
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("low_rank_ratios", TORCH_BOX(&run_ratios));
  m.impl("low_rank_limit", TORCH_BOX(&run_limit));
}

}  // namespace pykern
