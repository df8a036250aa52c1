// What the host wrappers of both log-probability ops check and prepare.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"

namespace pykern {

using torch::stable::contiguous;
using torch::stable::new_empty;

inline void check_targets(const Tensor& targets, int64_t vocabulary) {
  check_type(targets, ScalarType::Long, "targets");
  check_contiguous(targets, "targets");
  const int64_t* target = input<int64_t>(targets);
  for (int64_t row = 0; row < targets.numel(); ++row) {
    STD_TORCH_CHECK(target[row] < vocabulary, "targets: expected values below ", vocabulary, ", got ", target[row]);
  }
}

// 1 / temperature of every row.
inline std::vector<double> inverse_temperatures(const std::optional<Tensor>& row_temperature, double temperature,
                                                int64_t rows) {
  std::vector<double> inverse(rows, 1.0 / temperature);
  if (row_temperature) {
    check_type(*row_temperature, ScalarType::Double, "row_temperature");
    check_contiguous(*row_temperature, "row_temperature");
    STD_TORCH_CHECK(row_temperature->numel() == rows, "row_temperature: expected ", rows, " values, got ",
                    row_temperature->numel());
    for (int64_t row = 0; row < rows; ++row) inverse[row] = 1.0 / input<double>(*row_temperature)[row];
  }
  return inverse;
}

// float64 logits have float64 results, all others float32.
inline ScalarType result_type(DataType type) { return type == DataType::f64 ? ScalarType::Double : ScalarType::Float; }

// A gradient of the results as contiguous memory; undefined stays undefined.
inline std::optional<Tensor> contiguous_gradient(const std::optional<Tensor>& gradient, DataType type, int64_t rows,
                                                 const char* name) {
  if (!gradient) return std::nullopt;
  check_type(*gradient, result_type(type), name);
  STD_TORCH_CHECK(gradient->numel() == rows, name, ": expected ", rows, " values, got ", gradient->numel());
  return contiguous(*gradient);
}

inline const void* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

}  // namespace pykern
