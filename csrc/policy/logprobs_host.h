// What the host wrappers of both log-probability ops check and prepare.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
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

// Logits [..., vocabulary] of contiguous rows, one per target.
inline void check_logits(const Tensor& logits, const Tensor& targets) {
  STD_TORCH_CHECK(logits.dim() >= 1, "logits: expected at least 1 dimension");
  const int64_t last = logits.dim() - 1, vocabulary = logits.size(last);
  STD_TORCH_CHECK(logits.numel() == targets.numel() * vocabulary, "targets: expected one per row of logits, got ",
                  targets.numel());
  STD_TORCH_CHECK(vocabulary <= 1 || logits.stride(last) == 1, "logits: expected contiguous rows");
}

// Logits that are to be overwritten must have each element once.
inline void check_no_overlap(const Tensor& logits) {
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (int64_t dim = 0; dim < logits.dim(); ++dim) {
    if (logits.size(dim) > 1) by_stride.emplace_back(logits.stride(dim), logits.size(dim));
  }
  std::sort(by_stride.begin(), by_stride.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : by_stride) {
    STD_TORCH_CHECK(stride >= extent, "logits: expected no two elements at the same address, as they are overwritten");
    extent += stride * (size - 1);
  }
}

// hidden [N, H] and weight [V, H] of contiguous rows, targets [N] and bias [V].
inline void check_linear_head(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                              const std::optional<Tensor>& bias, int64_t vocabulary_start) {
  check_dim(hidden, 2, "hidden");
  check_dim(weight, 2, "weight");
  const int64_t rows = hidden.size(0), hidden_size = hidden.size(1), vocabulary = weight.size(0);
  check_size(weight, 1, hidden_size, "weight");
  check_type(weight, hidden.scalar_type(), "weight");
  check_dim(targets, 1, "targets");
  check_size(targets, 0, rows, "targets");
  check_type(targets, ScalarType::Long, "targets");
  check_contiguous(targets, "targets");
  STD_TORCH_CHECK(vocabulary_start >= 0, "vocabulary_start: expected 0 or more, got ", vocabulary_start);
  STD_TORCH_CHECK(hidden_size <= 1 || (hidden.stride(1) == 1 && weight.stride(1) == 1),
                  "hidden and weight: expected contiguous rows");
  STD_TORCH_CHECK(vocabulary < (int64_t{1} << 31), "weight: expected fewer than 2^31 rows");
  if (!bias) return;
  check_dim(*bias, 1, "bias");
  check_size(*bias, 0, vocabulary, "bias");
  check_type(*bias, ScalarType::Double, "bias");
  check_contiguous(*bias, "bias");
}

inline void check_row_temperature(const std::optional<Tensor>& row_temperature, int64_t rows) {
  if (!row_temperature) return;
  check_type(*row_temperature, ScalarType::Double, "row_temperature");
  check_contiguous(*row_temperature, "row_temperature");
  STD_TORCH_CHECK(row_temperature->numel() == rows, "row_temperature: expected ", rows, " values, got ",
                  row_temperature->numel());
}

// 1 / temperature of every row.
inline std::vector<double> inverse_temperatures(const std::optional<Tensor>& row_temperature, double temperature,
                                                int64_t rows) {
  check_row_temperature(row_temperature, rows);
  std::vector<double> inverse(rows, 1.0 / temperature);
  if (row_temperature) {
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

// What a backward of token_logprobs reads besides the logits, checked and contiguous.
struct TokenLogprobsGradients {
  Tensor statistics, entropy, sum_p2;
  std::optional<Tensor> grad_logprobs, grad_entropy, grad_sum_p2;

  TokenLogprobsGradients(DataType type, int64_t rows, Tensor statistics, Tensor entropy, Tensor sum_p2,
                         const std::optional<Tensor>& grad_logprobs, const std::optional<Tensor>& grad_entropy,
                         const std::optional<Tensor>& grad_sum_p2)
      : statistics(statistics),
        entropy(entropy),
        sum_p2(sum_p2),
        grad_logprobs(contiguous_gradient(grad_logprobs, type, rows, "grad_logprobs")),
        grad_entropy(contiguous_gradient(grad_entropy, type, rows, "grad_entropy")),
        grad_sum_p2(contiguous_gradient(grad_sum_p2, type, rows, "grad_sum_p2")) {
    STD_TORCH_CHECK(statistics.numel() == 2 * rows, "statistics: expected those of the forward");
    STD_TORCH_CHECK(!grad_entropy || entropy.numel() == rows, "entropy: expected that of the forward");
    STD_TORCH_CHECK(!grad_sum_p2 || sum_p2.numel() == rows, "sum_p2: expected that of the forward");
  }
};

inline const void* pointer_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

}  // namespace pykern
