// Host side of linear_token_logprobs on the CPU.
#include "policy/linear_logprobs.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/scratch.h"
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
    check_linear_head(hidden, weight, targets, bias, vocabulary_start);
    const int64_t rows = hidden.size(0), hidden_size = hidden.size(1), vocabulary = weight.size(0);
    const DataType type = data_type(hidden, "hidden");
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

std::tuple<Tensor, Tensor, Tensor> run_forward(Prepared& prepared, const Tensor& hidden, bool entropy, float* kept) {
  const int64_t rows = prepared.input.rows;
  const DataType type = prepared.input.type;
  prepared.choose_rows([](int64_t) { return false; });
  Tensor logprobs = torch::stable::new_zeros(hidden, {rows}, result_type(type));
  Tensor entropies = torch::stable::new_zeros(hidden, {entropy ? rows : 0}, result_type(type));
  Tensor statistics = torch::stable::new_zeros(hidden, {rows, 2}, result_type(type));
  const LinearLogprobsForward params{prepared.input, logprobs.mutable_data_ptr(),
                                     entropy ? entropies.mutable_data_ptr() : nullptr, statistics.mutable_data_ptr(),
                                     kept};
  if (prepared.input.rows > 0) {
    if (type == DataType::f64) {
      linear_logprobs_forward_f64(params);
    } else {
      STD_TORCH_CHECK(linear_logprobs_forward()(params), "linear_token_logprobs: not enough memory for the workspace");
    }
  }
  return {logprobs, entropies, statistics};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor hidden, Tensor weight, Tensor targets, std::optional<Tensor> bias,
                                           std::optional<Tensor> row_temperature, double temperature, double softcap,
                                           bool entropy, int64_t vocabulary_start) {
  Prepared prepared(hidden, weight, targets, bias, row_temperature, temperature, softcap, vocabulary_start);
  return run_forward(prepared, hidden, entropy, nullptr);
}

// The buffer for kept logits.
float* check_kept(const Tensor& logits, const LinearLogprobsInput& input) {
  check_cpu(logits, "logits");
  check_type(logits, ScalarType::Float, "logits");
  check_contiguous(logits, "logits");
  const int64_t needed = round_up(input.rows, kKeptRows) * round_up(input.vocabulary, kKeptEntries);
  STD_TORCH_CHECK(logits.numel() >= needed, "logits: expected at least ", needed, " elements, got ", logits.numel());
  STD_TORCH_CHECK(input.type == DataType::f32 || input.type == DataType::bf16, "hidden: expected float32 or bfloat16");
  return output<float>(logits);
}

std::tuple<Tensor, Tensor, Tensor> chunk_forward(Tensor hidden, Tensor weight, Tensor targets,
                                                 std::optional<Tensor> bias, std::optional<Tensor> row_temperature,
                                                 double temperature, double softcap, bool entropy, Tensor logits) {
  Prepared prepared(hidden, weight, targets, bias, row_temperature, temperature, softcap, 0);
  float* const kept = check_kept(logits, prepared.input);
  prefer_large_pages(kept, logits.numel() * sizeof(float));
  return run_forward(prepared, hidden, entropy, kept);
}

// Of the results' gradients and what of the forward their way back needs.
struct Gradients {
  std::optional<Tensor> logprobs, entropy;

  Gradients(const Prepared& prepared, const Tensor& statistics, const Tensor& entropies,
            const std::optional<Tensor>& grad_logprobs, const std::optional<Tensor>& grad_entropy)
      : logprobs(contiguous_gradient(grad_logprobs, prepared.input.type, prepared.input.rows, "grad_logprobs")),
        entropy(contiguous_gradient(grad_entropy, prepared.input.type, prepared.input.rows, "grad_entropy")) {
    STD_TORCH_CHECK(statistics.numel() == 2 * prepared.input.rows, "statistics: expected those of the forward");
    STD_TORCH_CHECK(!entropy || entropies.numel() == prepared.input.rows, "entropy: expected that of the forward");
  }

  // An exactly zero gradient needs no product. (A NaN is not zero and stays.)
  bool are_zero(DataType type, int64_t row) const {
    return is_zero(logprobs, type, row) && is_zero(entropy, type, row);
  }

 private:
  static bool is_zero(const std::optional<Tensor>& tensor, DataType type, int64_t row) {
    return !tensor || (type == DataType::f64 ? input<double>(*tensor)[row] == 0 : input<float>(*tensor)[row] == 0);
  }
};

std::tuple<Tensor, Tensor, Tensor> backward(Tensor hidden, Tensor weight, Tensor targets, std::optional<Tensor> bias,
                                            std::optional<Tensor> row_temperature, double temperature, double softcap,
                                            Tensor statistics, Tensor entropy, std::optional<Tensor> grad_logprobs,
                                            std::optional<Tensor> grad_entropy, int64_t vocabulary_start,
                                            bool hidden_needs_grad, bool weight_needs_grad, bool bias_needs_grad) {
  Prepared prepared(hidden, weight, targets, bias, row_temperature, temperature, softcap, vocabulary_start);
  const int64_t rows = prepared.input.rows, vocabulary = prepared.input.vocabulary;
  const DataType type = prepared.input.type;
  const Gradients gradients(prepared, statistics, entropy, grad_logprobs, grad_entropy);
  prepared.choose_rows([&](int64_t row) { return gradients.are_zero(type, row); });
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
                                      pointer_or_null(gradients.logprobs),
                                      pointer_or_null(gradients.entropy),
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

Tensor chunk_backward(Tensor hidden, Tensor weight, Tensor targets, std::optional<Tensor> bias,
                      std::optional<Tensor> row_temperature, double temperature, double softcap, Tensor statistics,
                      Tensor entropy, std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy,
                      Tensor logits, std::optional<Tensor> weight_sums, std::optional<Tensor> bias_sums,
                      bool hidden_needs_grad) {
  Prepared prepared(hidden, weight, targets, bias, row_temperature, temperature, softcap, 0);
  const LinearLogprobsInput& input = prepared.input;
  const int64_t rows = input.rows;
  const Gradients gradients(prepared, statistics, entropy, grad_logprobs, grad_entropy);
  const float* kept = check_kept(logits, input);
  const bool is_sum = weight_sums && weight_sums->scalar_type() == ScalarType::Float;
  if (weight_sums) {
    check_cpu(*weight_sums, "weight_sums");
    check_contiguous(*weight_sums, "weight_sums");
    check_dim(*weight_sums, 2, "weight_sums");
    check_size(*weight_sums, 0, input.vocabulary, "weight_sums");
    if (!is_sum) {
      check_type(*weight_sums, weight.scalar_type(), "weight_sums");
      check_size(*weight_sums, 1, input.hidden_size, "weight_sums");
    }
    STD_TORCH_CHECK(!is_sum || weight_sums->size(1) >= round_up(input.hidden_size, kKeptRows),
                    "weight_sums: expected rows of a multiple of 64");
    prefer_large_pages(weight_sums->mutable_data_ptr(), weight_sums->numel() * weight_sums->element_size());
  }
  if (bias_sums) {
    check_cpu(*bias_sums, "bias_sums");
    check_type(*bias_sums, ScalarType::Double, "bias_sums");
    check_contiguous(*bias_sums, "bias_sums");
    check_dim(*bias_sums, 1, "bias_sums");
    check_size(*bias_sums, 0, input.vocabulary, "bias_sums");
  }
  // The forward has left out the rows with a negative target, and those only.
  std::vector<int64_t> kept_index;
  int64_t kept_rows = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (input.targets[row] < 0) continue;
    if (!gradients.are_zero(input.type, row)) kept_index.push_back(kept_rows);
    ++kept_rows;
  }
  prepared.choose_rows([&](int64_t row) { return gradients.are_zero(input.type, row); });
  Tensor grad_hidden = torch::stable::new_zeros(hidden, {hidden_needs_grad ? rows : 0, input.hidden_size});
  const LinearLogprobsBackward params{input,
                                      statistics.const_data_ptr(),
                                      entropy.const_data_ptr(),
                                      pointer_or_null(gradients.logprobs),
                                      pointer_or_null(gradients.entropy),
                                      hidden_needs_grad ? grad_hidden.mutable_data_ptr() : nullptr,
                                      weight_sums && !is_sum ? weight_sums->mutable_data_ptr() : nullptr,
                                      bias_sums ? output<double>(*bias_sums) : nullptr,
                                      kept,
                                      kept_index.data(),
                                      kept_rows,
                                      is_sum ? output<float>(*weight_sums) : nullptr,
                                      is_sum ? weight_sums->size(1) : 0};
  if (input.rows > 0 && input.vocabulary > 0 && (hidden_needs_grad || weight_sums || bias_sums)) {
    STD_TORCH_CHECK(linear_logprobs_backward()(params), "linear_policy_loss: not enough memory for the workspace");
  }
  return grad_hidden;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("linear_token_logprobs", TORCH_BOX(&forward));
  m.impl("linear_token_logprobs_backward", TORCH_BOX(&backward));
  m.impl("linear_chunk_logprobs", TORCH_BOX(&chunk_forward));
  m.impl("linear_chunk_gradients", TORCH_BOX(&chunk_backward));
}

}  // namespace pykern
