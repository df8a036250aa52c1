// Host side of the norms on a GPU.
#include <optional>
#include <tuple>

#include "common/cuda.h"
#include "kernels/offload/norm.h"
#include "offload/norm_arguments.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor, Tensor> norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                                        bool centred) {
  check_norm(x, weight, bias, cuda::check_device);
  const cuda::DeviceGuard guard(x);
  const NormShape shape(x);
  const int64_t rows = shape.rows, columns = shape.columns;
  Tensor y = cuda::empty(x, x.sizes(), x.scalar_type()), rstd = cuda::empty(x, {rows}, ScalarType::Float);
  Tensor mean = cuda::empty(x, {centred ? rows : 0}, ScalarType::Float);
  if (rows == 0) return {y, mean, rstd};
  const NormParams params{cuda::input(x),
                          cuda::input(weight),
                          cuda::input(bias),
                          cuda::output(y),
                          centred ? cuda::output<float>(mean) : nullptr,
                          cuda::output<float>(rstd),
                          rows,
                          columns,
                          static_cast<float>(eps)};
  cuda::check_launch(launch_norm(data_type(x, "x"), params, cuda::current_stream(x)), "norm");
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor grad, Tensor x, std::optional<Tensor> weight, Tensor mean,
                                                 Tensor rstd, bool with_weight, bool with_bias) {
  check_norm_backward(grad, x, weight, mean, rstd, cuda::check_device);
  const cuda::DeviceGuard guard(x);
  const NormShape shape(x);
  const int64_t rows = shape.rows, columns = shape.columns;
  Tensor grad_x = cuda::empty(x, x.sizes(), x.scalar_type());
  if (x.numel() == 0) {
    return {grad_x, cuda::new_zeros(x, {with_weight ? columns : 0}), cuda::new_zeros(x, {with_bias ? columns : 0})};
  }
  Tensor grad_weight = cuda::empty(x, {with_weight ? columns : 0}, x.scalar_type());
  Tensor grad_bias = cuda::empty(x, {with_bias ? columns : 0}, x.scalar_type());
  const int64_t wanted = (with_weight ? 1 : 0) + (with_bias ? 1 : 0);
  Tensor partial = cuda::empty(x, {norm_backward_blocks(rows, columns) * wanted * columns}, ScalarType::Float);
  const NormBackwardParams params{cuda::input(grad),
                                  cuda::input(x),
                                  cuda::input(weight),
                                  mean.numel() > 0 ? cuda::input<float>(mean) : nullptr,
                                  cuda::input<float>(rstd),
                                  cuda::output(grad_x),
                                  with_weight ? cuda::output(grad_weight) : nullptr,
                                  with_bias ? cuda::output(grad_bias) : nullptr,
                                  wanted > 0 ? cuda::workspace<float>(partial) : nullptr,
                                  rows,
                                  columns};
  cuda::check_launch(launch_norm_backward(data_type(x, "x"), params, cuda::current_stream(x)), "norm_backward");
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace pykern
