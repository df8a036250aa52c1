// float64 token log-probabilities in plain loops: they serve gradient checks, not speed.
#include <algorithm>
#include <cmath>
#include <limits>

#include "policy/logprobs.h"

namespace pykern {

void token_logprobs_forward_f64(const TokenLogprobsForward& params) {
  const TokenLogprobsInput& input = params.input;
  auto* logprobs = static_cast<double*>(params.logprobs);
  auto* entropy = static_cast<double*>(params.entropy);
  auto* sum_p2 = static_cast<double*>(params.sum_p2);
  auto* statistics = static_cast<double*>(params.statistics);
  for (int64_t row = 0; row < input.rows; ++row) {
    double maximum = 0, log_sum = 0, logprob = 0, weighted = 0, sum = 1, squares = 0;
    if (input.targets[row] >= 0) {
      const double* logits = static_cast<const double*>(input.logits) + input.row_offset[row];
      const double inverse = input.inverse_temperature[row];
      maximum = std::numeric_limits<double>::lowest();
      for (int64_t v = 0; v < input.vocabulary; ++v) maximum = std::max(maximum, logits[v]);
      sum = 0;
      for (int64_t v = 0; v < input.vocabulary; ++v) {
        const double exponent = (logits[v] - maximum) * inverse;
        const double e = std::exp(exponent);
        sum += e;
        weighted += e == 0 ? 0 : e * exponent;
        squares += e * e;
      }
      log_sum = std::log(sum);
      logprob = (logits[input.targets[row]] - maximum) * inverse - log_sum;
    }
    logprobs[row] = logprob;
    statistics[2 * row] = maximum;
    statistics[2 * row + 1] = log_sum;
    if (entropy) entropy[row] = log_sum - weighted / sum;
    if (sum_p2) sum_p2[row] = squares / (sum * sum);
  }
}

void token_logprobs_backward_f64(const TokenLogprobsBackward& params) {
  const TokenLogprobsInput& input = params.input;
  const auto* statistics = static_cast<const double*>(params.statistics);
  for (int64_t row = 0; row < input.rows; ++row) {
    const auto at = [row](const void* pointer) { return pointer ? static_cast<const double*>(pointer)[row] : 0.0; };
    const double g_logprob = at(params.grad_logprobs);
    const double g_entropy = at(params.grad_entropy), g_squares = at(params.grad_sum_p2);
    const double entropy = params.grad_entropy ? at(params.entropy) : 0;
    const double sum_p2 = params.grad_sum_p2 ? at(params.sum_p2) : 0;
    double* gradient = static_cast<double*>(params.grad_logits) +
                       (params.in_place ? input.row_offset[row] : row * input.vocabulary);
    const int64_t target = input.targets[row];
    if (target < 0 || (g_logprob == 0 && g_entropy == 0 && g_squares == 0)) {
      std::fill(gradient, gradient + input.vocabulary, 0.0);
      continue;
    }
    const double* logits = static_cast<const double*>(input.logits) + input.row_offset[row];
    const double inverse = input.inverse_temperature[row];
    for (int64_t v = 0; v < input.vocabulary; ++v) {
      const double log_p = (logits[v] - statistics[2 * row]) * inverse - statistics[2 * row + 1];
      const double p = std::exp(log_p);
      const double from_entropy = p == 0 ? 0 : p * (log_p + entropy);
      const double from_squares = 2 * p * (p - sum_p2);
      gradient[v] = (g_logprob * ((v == target) - p) - g_entropy * from_entropy + g_squares * from_squares) * inverse;
    }
  }
}

}  // namespace pykern
