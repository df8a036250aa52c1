// The one-element arguments of a CPU step, resolved into the constants of one update.
#pragma once

#include <cmath>
#include <optional>

#include "lowrank/arguments.h"
#include "lowrank/step.h"

namespace pykern::lowrank {

inline double number(const Tensor& tensor) {
  return is_double(tensor) ? *input<double>(tensor) : static_cast<double>(*input<float>(tensor));
}

inline void set_number(const Tensor& tensor, double value) {
  if (is_double(tensor)) {
    *output<double>(tensor) = value;
  } else {
    *output<float>(tensor) = static_cast<float>(value);
  }
}

inline bool is_skipped(const std::optional<Tensor>& found_inf) { return found_inf && *input<float>(*found_inf) != 0; }

// What the gradient as it came is multiplied by.
inline double gradient_factor(const std::optional<Tensor>& grad_scale, bool maximize) {
  return (maximize ? -1.0 : 1.0) / (grad_scale ? *input<float>(*grad_scale) : 1.0);
}

inline double next_count(const Tensor& step) { return *output<float>(step) += 1; }

// What the first moment, the root of the second and the learning rate are multiplied by. Where epsilon is added to the
// uncorrected root, the step size has both corrections.
struct BiasCorrections {
  double first, second, rate;
};

inline BiasCorrections bias_corrections(double beta1, double beta2, double count, bool corrected_eps) {
  const double first = 1 / (1 - std::pow(beta1, count)), root = std::sqrt(1 - std::pow(beta2, count));
  if (corrected_eps) return {first, 1 / root, 1.0};
  return {1.0, 1.0, root * first};
}

// Counts the step; the tensors are checked already.
inline AdamRule next_rule(const Tensor& step, double rate, double beta1, double beta2, double eps, double weight_decay,
                          bool decay_after, bool corrected_eps, double sign) {
  const BiasCorrections corrections = bias_corrections(beta1, beta2, next_count(step), corrected_eps);
  AdamRule rule{};
  rule.beta1 = beta1;
  rule.beta2 = beta2;
  rule.eps = eps;
  rule.first = corrections.first;
  rule.second = corrections.second;
  rule.decay = 1 - rate * weight_decay;
  rule.step_size = rate * corrections.rate;
  if (decay_after) rule.step_size *= rule.decay;
  rule.sign = sign;
  return rule;
}

}  // namespace pykern::lowrank
