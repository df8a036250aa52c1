// float64 token log-probabilities from hidden states in plain loops: they serve gradient checks, not speed.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "policy/linear_logprobs.h"

namespace pykern {
namespace {

const double* hidden_row(const LinearLogprobsInput& input, int64_t row) {
  return static_cast<const double*>(input.hidden) + row * input.hidden_stride;
}

const double* weight_row(const LinearLogprobsInput& input, int64_t entry) {
  return static_cast<const double*>(input.weight) + entry * input.weight_stride;
}

// The logits of one row after bias and softcap, and d (logit / temperature) / d product.
void row_logits(const LinearLogprobsInput& input, int64_t row, std::vector<double>& logits,
                std::vector<double>& slope) {
  const double* hidden = hidden_row(input, row);
  for (int64_t v = 0; v < input.vocabulary; ++v) {
    const double* weight = weight_row(input, v);
    double z = input.bias ? input.bias[v] : 0;
    for (int64_t h = 0; h < input.hidden_size; ++h) z += hidden[h] * weight[h];
    slope[v] = input.inverse_temperature[row];
    if (input.softcap > 0) {
      const double t = std::tanh(z / input.softcap);
      z = input.softcap * t;
      slope[v] *= 1 - t * t;
    }
    logits[v] = z;
  }
}

}  // namespace

void linear_logprobs_forward_f64(const LinearLogprobsForward& params) {
  const LinearLogprobsInput& input = params.input;
  std::vector<double> logits(input.vocabulary), slope(input.vocabulary);
  for (int64_t index = 0; index < input.rows; ++index) {
    const int64_t row = input.active[index];
    row_logits(input, row, logits, slope);
    const double inverse = input.inverse_temperature[row];
    double maximum = std::numeric_limits<double>::lowest(), sum = 0, weighted = 0;
    for (const double logit : logits) maximum = std::max(maximum, logit);
    for (const double logit : logits) {
      const double exponent = (logit - maximum) * inverse;
      const double e = std::exp(exponent);
      sum += e;
      weighted += e == 0 ? 0 : e * exponent;
    }
    const double log_sum = std::log(sum);
    static_cast<double*>(params.statistics)[2 * row] = maximum;
    static_cast<double*>(params.statistics)[2 * row + 1] = log_sum;
    const int64_t target = input.targets[row] - input.vocabulary_start;
    const double target_logit = target >= 0 && target < input.vocabulary ? logits[target] : 0;
    static_cast<double*>(params.logprobs)[row] = (target_logit - maximum) * inverse - log_sum;
    if (params.entropy) static_cast<double*>(params.entropy)[row] = log_sum - weighted / sum;
  }
}

void linear_logprobs_backward_f64(const LinearLogprobsBackward& params) {
  const LinearLogprobsInput& input = params.input;
  const auto at = [](const void* pointer, int64_t i) { return pointer ? static_cast<const double*>(pointer)[i] : 0.0; };
  auto* grad_hidden = static_cast<double*>(params.grad_hidden);
  auto* grad_weight = static_cast<double*>(params.grad_weight);
  if (grad_weight) std::fill(grad_weight, grad_weight + input.vocabulary * input.hidden_size, 0.0);
  if (params.grad_bias) std::fill(params.grad_bias, params.grad_bias + input.vocabulary, 0.0);
  std::vector<double> logits(input.vocabulary), slope(input.vocabulary);
  for (int64_t index = 0; index < input.rows; ++index) {
    const int64_t row = input.active[index];
    row_logits(input, row, logits, slope);
    const double inverse = input.inverse_temperature[row];
    const double g_logprob = at(params.grad_logprobs, row), g_entropy = at(params.grad_entropy, row);
    const double entropy = params.grad_entropy ? at(params.entropy, row) : 0;
    const int64_t target = input.targets[row] - input.vocabulary_start;
    double* to_hidden = grad_hidden ? grad_hidden + row * input.hidden_size : nullptr;
    if (to_hidden) std::fill(to_hidden, to_hidden + input.hidden_size, 0.0);
    for (int64_t v = 0; v < input.vocabulary; ++v) {
      const double log_p = (logits[v] - at(params.statistics, 2 * row)) * inverse - at(params.statistics, 2 * row + 1);
      const double p = std::exp(log_p);
      const double from_entropy = p == 0 ? 0 : p * (log_p + entropy);
      const double gradient = (g_logprob * ((v == target) - p) - g_entropy * from_entropy) * slope[v];
      if (params.grad_bias) params.grad_bias[v] += gradient;
      for (int64_t h = 0; h < input.hidden_size; ++h) {
        if (to_hidden) to_hidden[h] += gradient * weight_row(input, v)[h];
        if (grad_weight) grad_weight[v * input.hidden_size + h] += gradient * hidden_row(input, row)[h];
      }
    }
  }
}

}  // namespace pykern
