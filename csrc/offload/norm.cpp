// Host side of the norms on the CPU. Float64 goes through plain loops: it serves gradient checks, not speed.
#include "offload/norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "common/parallel.h"
#include "common/scratch.h"
#include "offload/norm_arguments.h"

namespace pykern {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

// Elements of a task's rows, at least.
constexpr int64_t kTaskElements = 16384;
// Most parts in which columns are summed. By the shape alone, so that results don't depend on the number of threads.
constexpr int64_t kMostParts = 64;

void norm_f64(const double* x, const double* weight, const double* bias, double eps, int64_t rows, int64_t columns,
              double* y, double* mean, double* rstd) {
  for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
    double sum = 0, squares = 0;
    if (mean) {
      for (int64_t i = 0; i < columns; ++i) sum += x[i];
      mean[row] = sum / static_cast<double>(columns);
    }
    const double centre = mean ? mean[row] : 0;
    for (int64_t i = 0; i < columns; ++i) squares += (x[i] - centre) * (x[i] - centre);
    rstd[row] = 1 / std::sqrt(squares / static_cast<double>(columns) + eps);
    for (int64_t i = 0; i < columns; ++i) {
      y[i] = (x[i] - centre) * rstd[row] * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
    }
  }
}

void norm_backward_f64(const double* grad, const double* x, const double* weight, const double* mean,
                       const double* rstd, int64_t rows, int64_t columns, double* grad_x, double* grad_weight,
                       double* grad_bias) {
  for (int64_t row = 0; row < rows; ++row, x += columns, grad += columns, grad_x += columns) {
    const double centre = mean ? mean[row] : 0;
    double along = 0, plain = 0;
    for (int64_t i = 0; i < columns; ++i) {
      const double normal = (x[i] - centre) * rstd[row], weighted = grad[i] * (weight ? weight[i] : 1);
      along += weighted * normal / static_cast<double>(columns);
      plain += mean ? weighted / static_cast<double>(columns) : 0;
      if (grad_weight) grad_weight[i] += grad[i] * normal;
      if (grad_bias) grad_bias[i] += grad[i];
    }
    for (int64_t i = 0; i < columns; ++i) {
      const double normal = (x[i] - centre) * rstd[row], weighted = grad[i] * (weight ? weight[i] : 1);
      grad_x[i] = rstd[row] * (weighted - plain - normal * along);
    }
  }
}

template <class T>
T* output_or_null(Tensor& tensor) {
  return tensor.numel() > 0 ? output<T>(tensor) : nullptr;
}

template <class T = void>
const T* input_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                                        bool centred) {
  check_norm(x, weight, bias, check_cpu);
  const DataType type = data_type(x, "x");
  const NormShape shape(x);
  const int64_t rows = shape.rows, columns = shape.columns;
  Tensor y = torch::stable::empty_like(x), rstd = new_empty(x, {rows}, statistics_type(x));
  Tensor mean = new_empty(x, {centred ? rows : 0}, statistics_type(x));
  if (rows == 0) return {y, mean, rstd};
  if (type == DataType::f64) {
    norm_f64(input<double>(x), input_or_null<double>(weight), input_or_null<double>(bias), eps, rows, columns,
             output<double>(y), output_or_null<double>(mean), output<double>(rstd));
    return {y, mean, rstd};
  }
  const NormParams params{x.const_data_ptr(),    input_or_null(weight), input_or_null(bias),
                          y.mutable_data_ptr(),  output_or_null<float>(mean), output<float>(rstd),
                          rows,                  columns,               static_cast<float>(eps)};
  const int64_t task_rows = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, columns));
  parallel_tasks(ceil_div(rows, task_rows), [&](int64_t task, int) {
    norm_rows()(type, params, task * task_rows, std::min(rows, (task + 1) * task_rows));
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor grad, Tensor x, std::optional<Tensor> weight, Tensor mean,
                                                 Tensor rstd, bool with_weight, bool with_bias) {
  check_norm_backward(grad, x, weight, mean, rstd, check_cpu);
  const DataType type = data_type(x, "x");
  const NormShape shape(x);
  const int64_t rows = shape.rows, columns = shape.columns;
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = new_zeros(x, {with_weight ? columns : 0}), grad_bias = new_zeros(x, {with_bias ? columns : 0});
  if (x.numel() == 0) return {grad_x, grad_weight, grad_bias};
  const bool centred = mean.numel() > 0;
  if (type == DataType::f64) {
    norm_backward_f64(input<double>(grad), input<double>(x), input_or_null<double>(weight),
                      centred ? input<double>(mean) : nullptr, input<double>(rstd), rows, columns,
                      output<double>(grad_x), output_or_null<double>(grad_weight), output_or_null<double>(grad_bias));
    return {grad_x, grad_weight, grad_bias};
  }
  const int64_t least = std::max<int64_t>(1, kTaskElements / columns);
  const int64_t task_rows = std::max(least, ceil_div(rows, kMostParts)), parts = ceil_div(rows, task_rows);
  const int64_t stride = round_up(columns, 16), wanted = (with_weight ? 1 : 0) + (with_bias ? 1 : 0);
  const Scratch memory(static_cast<size_t>(parts * wanted * stride) * sizeof(float));
  float* sums = memory.get<float>();
  STD_TORCH_CHECK(sums != nullptr || wanted == 0, "norm_backward: no memory for sums of columns");
  const NormBackwardParams params{grad.const_data_ptr(),
                                  x.const_data_ptr(),
                                  input_or_null(weight),
                                  centred ? input<float>(mean) : nullptr,
                                  input<float>(rstd),
                                  grad_x.mutable_data_ptr(),
                                  with_weight ? grad_weight.mutable_data_ptr() : nullptr,
                                  with_bias ? grad_bias.mutable_data_ptr() : nullptr,
                                  sums,
                                  rows,
                                  columns};
  parallel_tasks(parts, [&](int64_t part, int) {
    norm_backward_rows()(type, params, part * task_rows, std::min(rows, (part + 1) * task_rows),
                         sums + part * wanted * stride, stride);
  });
  if (with_weight) norm_sum_parts()(type, sums, parts, wanted * stride, columns, params.grad_weight);
  if (with_bias) {
    norm_sum_parts()(type, sums + (wanted - 1) * stride, parts, wanted * stride, columns, params.grad_bias);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace pykern
