// What the CPU and the CUDA side of the norms share: checks of the arguments.
#pragma once

#include <optional>

#include "common/checks.h"

namespace pykern {

// A tensor of any dimensions as rows of its last one.
struct NormShape {
  explicit NormShape(const Tensor& x) : rows(1), columns(x.size(x.dim() - 1)) {
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) rows *= x.size(dim);
  }
  int64_t rows, columns;
};

inline void check_norm_line(const std::optional<Tensor>& line, const Tensor& x, const char* name,
                            DeviceCheck check_device) {
  if (!line) return;
  check_device(*line, name);
  check_dim(*line, 1, name);
  check_size(*line, 0, NormShape(x).columns, name);
  check_contiguous(*line, name);
  check_type(*line, x.scalar_type(), name);
}

inline void check_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                       DeviceCheck check_device) {
  check_device(x, "x");
  STD_TORCH_CHECK(x.dim() > 0, "x: expected at least one dimension");
  check_contiguous(x, "x");
  check_norm_line(weight, x, "weight", check_device);
  check_norm_line(bias, x, "bias", check_device);
}

// The rows' statistics have the type in which they were computed.
inline ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_norm_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                                const Tensor& mean, const Tensor& rstd, DeviceCheck check_device) {
  check_norm(x, weight, std::nullopt, check_device);
  check_device(grad, "grad");
  check_dim(grad, x.dim(), "grad");
  for (int64_t dim = 0; dim < x.dim(); ++dim) check_size(grad, dim, x.size(dim), "grad");
  check_contiguous(grad, "grad");
  check_type(grad, x.scalar_type(), "grad");
  for (const auto& [line, name] : {std::pair(mean, "mean"), std::pair(rstd, "rstd")}) {
    check_device(line, name);
    check_dim(line, 1, name);
    check_contiguous(line, name);
    check_type(line, statistics_type(x), name);
  }
  check_size(rstd, 0, NormShape(x).rows, "rstd");
  if (mean.numel() > 0) check_size(mean, 0, NormShape(x).rows, "mean");
}

}  // namespace pykern
