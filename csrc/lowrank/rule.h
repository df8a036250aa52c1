// Step count and learning rate of a CPU step, resolved into the constants of one update.
#pragma once

#include <cmath>

#include "lowrank/arguments.h"
#include "lowrank/step.h"

namespace pykern::lowrank {

inline double number(const Tensor& tensor) {
  return is_double(tensor) ? *input<double>(tensor) : static_cast<double>(*input<float>(tensor));
}

// Counts the step and folds the bias corrections: into the moments, or, with the epsilon added to the
// uncorrected root, into the step size. The tensors are checked already.
inline AdamRule next_rule(const Tensor& step, double rate, double beta1, double beta2, double eps, double weight_decay,
                          bool decay_after, bool corrected_eps, bool maximize) {
  const double count = number(step) + 1;
  if (is_double(step)) {
    *output<double>(step) = count;
  } else {
    *output<float>(step) = static_cast<float>(count);
  }
  const double first = 1 / (1 - std::pow(beta1, count)), root = std::sqrt(1 - std::pow(beta2, count));
  AdamRule rule{};
  rule.beta1 = beta1;
  rule.beta2 = beta2;
  rule.eps = eps;
  rule.first = corrected_eps ? first : 1.0;
  rule.second = corrected_eps ? 1 / root : 1.0;
  rule.decay = 1 - rate * weight_decay;
  rule.step_size = corrected_eps ? rate : rate * root * first;
  if (decay_after) rule.step_size *= rule.decay;
  rule.sign = maximize ? -1.0 : 1.0;
  return rule;
}

}  // namespace pykern::lowrank
