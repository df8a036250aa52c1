// Memory for the constants of one update on the device.
#pragma once

#include "common/cuda.h"
#include "kernels/lowrank/adam.h"
#include "lowrank/arguments.h"

namespace pykern::lowrank {

inline Tensor new_rule(const Tensor& like) {
  return cuda::empty(like, {static_cast<int64_t>(sizeof(AdamRule))}, ScalarType::Byte);
}

// Without learning rate and residual; the caller adds the rest.
inline AdamRuleParams rule_params(const Tensor& rule, const Tensor& step) {
  AdamRuleParams params{};
  params.step = cuda::output<void>(step);
  params.step_is_double = is_double(step);
  params.rule = cuda::workspace<AdamRule>(rule);
  return params;
}

}  // namespace pykern::lowrank
