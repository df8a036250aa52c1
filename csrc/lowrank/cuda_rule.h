// Memory for the constants of one update on the device.
#pragma once

#include "common/cuda.h"
#include "kernels/lowrank/adam.h"
#include "lowrank/arguments.h"

namespace pykern::lowrank {

inline Tensor new_rule(const Tensor& like) {
  return cuda::empty(like, {static_cast<int64_t>(sizeof(AdamRule))}, ScalarType::Byte);
}

// What resolves the rule of one update. Without `lr` its rate is 1; the residual is the caller's to add.
inline AdamRuleParams rule_params(const Tensor& rule, const Tensor& step, const Tensor* lr, double beta1, double beta2,
                                  double eps, double weight_decay, bool decay_after, bool corrected_eps,
                                  bool maximize) {
  AdamRuleParams params{};
  params.step = cuda::output<void>(step);
  params.step_is_double = is_double(step);
  params.lr = lr ? cuda::input<void>(*lr) : nullptr;
  params.lr_is_double = lr && is_double(*lr);
  params.beta1 = beta1;
  params.beta2 = beta2;
  params.eps = eps;
  params.weight_decay = weight_decay;
  params.decay_after = decay_after;
  params.corrected_eps = corrected_eps;
  params.maximize = maximize;
  params.rule = cuda::workspace<AdamRule>(rule);
  return params;
}

}  // namespace pykern::lowrank
