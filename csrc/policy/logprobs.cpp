// Host side of token_logprobs on the CPU.
#include "policy/logprobs.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "policy/logprobs_host.h"

namespace pykern {
namespace {

// Where each row of [..., vocabulary] starts, whatever the strides of the leading dimensions.
std::vector<int64_t> row_offsets(const Tensor& logits, int64_t rows) {
  const int64_t leading = logits.dim() - 1;
  std::vector<int64_t> offsets(rows), position(leading, 0);
  int64_t offset = 0;
  for (int64_t row = 0; row < rows; ++row) {
    offsets[row] = offset;
    for (int64_t dim = leading - 1; dim >= 0; --dim) {
      offset += logits.stride(dim);
      if (++position[dim] < logits.size(dim)) break;
      offset -= position[dim] * logits.stride(dim);
      position[dim] = 0;
    }
  }
  return offsets;
}

// Owns the arrays that a TokenLogprobsInput points to.
struct Prepared {
  std::vector<int64_t> offsets;
  std::vector<double> inverse_temperature;
  TokenLogprobsInput input;

  Prepared(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& row_temperature,
           double temperature) {
    check_cpu(logits, "logits");
    check_logits(logits, targets);
    const int64_t vocabulary = logits.size(logits.dim() - 1), rows = targets.numel();
    check_targets(targets, vocabulary);
    offsets = row_offsets(logits, rows);
    inverse_temperature = inverse_temperatures(row_temperature, temperature, rows);
    input = {data_type(logits, "logits"),       rows, vocabulary, logits.const_data_ptr(), offsets.data(),
             pykern::input<int64_t>(targets), inverse_temperature.data()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor logits, Tensor targets, std::optional<Tensor> row_temperature,
                                                   double temperature, bool entropy, bool sum_p2) {
  const Prepared prepared(logits, targets, row_temperature, temperature);
  const int64_t rows = prepared.input.rows;
  const ScalarType type = result_type(prepared.input.type);
  Tensor logprobs = new_empty(logits, targets.sizes(), type);
  Tensor entropies = entropy ? new_empty(logits, targets.sizes(), type) : new_empty(logits, {0}, type);
  Tensor squares = sum_p2 ? new_empty(logits, targets.sizes(), type) : new_empty(logits, {0}, type);
  Tensor statistics = new_empty(logits, {rows, 2}, type);
  const TokenLogprobsForward params{prepared.input, logprobs.mutable_data_ptr(),
                                    entropy ? entropies.mutable_data_ptr() : nullptr,
                                    sum_p2 ? squares.mutable_data_ptr() : nullptr, statistics.mutable_data_ptr()};
  if (rows > 0) {
    prepared.input.type == DataType::f64 ? token_logprobs_forward_f64(params) : token_logprobs_forward()(params);
  }
  return {logprobs, entropies, squares, statistics};
}

void run_backward(const Prepared& prepared, const TokenLogprobsGradients& given, Tensor& grad_logits, bool in_place) {
  const TokenLogprobsBackward params{prepared.input,
                                     given.statistics.const_data_ptr(),
                                     given.entropy.const_data_ptr(),
                                     given.sum_p2.const_data_ptr(),
                                     pointer_or_null(given.grad_logprobs),
                                     pointer_or_null(given.grad_entropy),
                                     pointer_or_null(given.grad_sum_p2),
                                     grad_logits.mutable_data_ptr(),
                                     in_place};
  if (prepared.input.rows == 0) return;
  prepared.input.type == DataType::f64 ? token_logprobs_backward_f64(params) : token_logprobs_backward()(params);
}

Tensor backward(Tensor logits, Tensor targets, std::optional<Tensor> row_temperature, double temperature,
                Tensor statistics, Tensor entropy, Tensor sum_p2, std::optional<Tensor> grad_logprobs,
                std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_sum_p2) {
  const Prepared prepared(logits, targets, row_temperature, temperature);
  const TokenLogprobsGradients given(prepared.input.type, prepared.input.rows, statistics, entropy, sum_p2,
                                     grad_logprobs, grad_entropy, grad_sum_p2);
  Tensor grad_logits = new_empty(logits, logits.sizes());
  run_backward(prepared, given, grad_logits, false);
  return grad_logits;
}

void backward_in_place(Tensor logits, Tensor targets, std::optional<Tensor> row_temperature, double temperature,
                       Tensor statistics, Tensor entropy, Tensor sum_p2, std::optional<Tensor> grad_logprobs,
                       std::optional<Tensor> grad_entropy, std::optional<Tensor> grad_sum_p2) {
  check_no_overlap(logits);
  const Prepared prepared(logits, targets, row_temperature, temperature);
  const TokenLogprobsGradients given(prepared.input.type, prepared.input.rows, statistics, entropy, sum_p2,
                                     grad_logprobs, grad_entropy, grad_sum_p2);
  run_backward(prepared, given, logits, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&forward));
  m.impl("token_logprobs_backward", TORCH_BOX(&backward));
  m.impl("token_logprobs_backward_in_place", TORCH_BOX(&backward_in_place));
}

}  // namespace pykern
