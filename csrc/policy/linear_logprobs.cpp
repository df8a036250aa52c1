// Host side of linear_token_logprobs on the CPU.
#include "policy/linear_logprobs.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "policy/logprobs_host.h"

namespace pykern {
namespace {

// Owns the arrays that a LinearLogprobsInput points to.
struct Prepared {
  std::vector<int64_t> active;
  std::vector<double> inverse_temperature;
  LinearLogprobsInput input;

  Prepared(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& row_temperature, double temperature, double softcap,
           int64_t vocabulary_start) {
    check_cpu(hidden, "hidden");
    check_cpu(weight, "weight");
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
    const DataType type = data_type(hidden, "hidden");
    if (bias) {
      check_dim(*bias, 1, "bias");
      check_size(*bias, 0, vocabulary, "bias");
      check_type(*bias, ScalarType::Double, "bias");
      check_contiguous(*bias, "bias");
    }
    inverse_temperature = inverse_temperatures(row_temperature, temperature, rows);
    input = {type, rows, hidden_size, vocabulary, vocabulary_start, nullptr, hidden.const_data_ptr(),
             weight.const_data_ptr(), hidden.stride(0), weight.stride(0), bias ? pykern::input<double>(*bias) : nullptr,
             pykern::input<int64_t>(targets), inverse_temperature.data(), softcap};
  }

  // Leaves out the rows for which `dropped` holds, and all with a negative target.
  template <class Dropped>
  void choose_rows(const Dropped& dropped) {
    for (int64_t row = 0; row < input.rows; ++row) {
      if (input.targets[row] >= 0 && !dropped(row)) active.push_back(row);
    }
    input.active = active.data();
    input.rows = static_cast<int64_t>(active.size());
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor hidden, Tensor weight, Tensor targets, std::optional<Tensor> bias,
                                           std::optional<Tensor> row_temperature, double temperature, double softcap,
                                           bool entropy, int64_t vocabulary_start) {
  Prepared prepared(hidden, weight, targets, bias, row_temperature, temperature, softcap, vocabulary_start);
  const int64_t rows = prepared.input.rows;
  const DataType type = prepared.input.type;
  prepared.choose_rows([](int64_t) { return false; });
  Tensor logprobs = torch::stable::new_zeros(hidden, {rows}, result_type(type));
  Tensor entropies = torch::stable::new_zeros(hidden, {entropy ? rows : 0}, result_type(type));
  Tensor statistics = torch::stable::new_zeros(hidden, {rows, 2}, result_type(type));
  const LinearLogprobsForward params{prepared.input, logprobs.mutable_data_ptr(),
                                     entropy ? entropies.mutable_data_ptr() : nullptr, statistics.mutable_data_ptr()};
  if (prepared.input.rows > 0) {
    if (type == DataType::f64) {
      linear_logprobs_forward_f64(params);
    } else {
      STD_TORCH_CHECK(linear_logprobs_forward()(params), "linear_token_logprobs: not enough memory for the workspace");
    }
  }
  return {logprobs, entropies, statistics};
}

double value_or_zero(const std::optional<Tensor>& tensor, DataType type, int64_t row) {
  if (!tensor) return 0;
  return type == DataType::f64 ? input<double>(*tensor)[row] : input<float>(*tensor)[row];
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor hidden, Tensor weight, Tensor targets, std::optional<Tensor> bias,
                                            std::optional<Tensor> row_temperature, double temperature, double softcap,
                                            Tensor statistics, Tensor entropy, std::optional<Tensor> grad_logprobs,
                                            std::optional<Tensor> grad_entropy, int64_t vocabulary_start,
                                            bool hidden_needs_grad, bool weight_needs_grad, bool bias_needs_grad) {
  Prepared prepared(hidden, weight, targets, bias, row_temperature, temperature, softcap, vocabulary_start);
  const int64_t rows = prepared.input.rows, vocabulary = prepared.input.vocabulary;
  const DataType type = prepared.input.type;
  grad_logprobs = contiguous_gradient(grad_logprobs, type, rows, "grad_logprobs");
  grad_entropy = contiguous_gradient(grad_entropy, type, rows, "grad_entropy");
  STD_TORCH_CHECK(statistics.numel() == 2 * rows, "statistics: expected those of the forward");
  STD_TORCH_CHECK(!grad_entropy || entropy.numel() == rows, "entropy: expected that of the forward");
  // An exactly zero gradient needs no product. (A NaN is not zero and stays.)
  prepared.choose_rows([&, type = type](int64_t row) {
    return value_or_zero(grad_logprobs, type, row) == 0 && value_or_zero(grad_entropy, type, row) == 0;
  });
  const bool some = prepared.input.rows > 0 && vocabulary > 0;
  const auto gradient = [&](bool needed, const Tensor& like, std::vector<int64_t> sizes, bool whole) {
    if (!needed) sizes = {0};
    return whole ? new_empty(like, sizes) : torch::stable::new_zeros(like, sizes);
  };
  const int64_t hidden_size = prepared.input.hidden_size;
  Tensor grad_hidden = gradient(hidden_needs_grad, hidden, {rows, hidden_size}, some && prepared.input.rows == rows);
  Tensor grad_weight = gradient(weight_needs_grad, weight, {vocabulary, hidden_size}, some);
  Tensor grad_bias = torch::stable::new_zeros(hidden, {bias_needs_grad ? vocabulary : 0}, ScalarType::Double);
  const LinearLogprobsBackward params{prepared.input,
                                      statistics.const_data_ptr(),
                                      entropy.const_data_ptr(),
                                      pointer_or_null(grad_logprobs),
                                      pointer_or_null(grad_entropy),
                                      hidden_needs_grad ? grad_hidden.mutable_data_ptr() : nullptr,
                                      weight_needs_grad ? grad_weight.mutable_data_ptr() : nullptr,
                                      bias_needs_grad ? output<double>(grad_bias) : nullptr};
  if (some && (hidden_needs_grad || weight_needs_grad || bias_needs_grad)) {
    if (type == DataType::f64) {
      linear_logprobs_backward_f64(params);
    } else {
      STD_TORCH_CHECK(linear_logprobs_backward()(params), "linear_token_logprobs: not enough memory for the workspace");
    }
  }
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("linear_token_logprobs", TORCH_BOX(&forward));
  m.impl("linear_token_logprobs_backward", TORCH_BOX(&backward));
}

}  // namespace pykern
