#include "common/library.h"

namespace pykern {

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  // Lists of matrices [n, length], the compressed axis first; pykern/lowrank/ops.py says what each op does.
  m.def(
      "low_rank_adamw_step(Tensor(a!)[] param, Tensor[] grad, Tensor[] projector, Tensor(b!)[] exp_avg, "
      "Tensor(c!)[] exp_avg_sq, Tensor(d!)[] step, Tensor(e!)[] residual_norm, Tensor lr, Tensor? grad_scale, "
      "Tensor? found_inf, *, float beta1, float beta2, float eps, bool corrected_eps, float weight_decay, "
      "bool decay_after, float scale, int residual, float removed, float growth, bool zero_norm_limits, "
      "float amplitude, bool amplitude_first, bool orthonormal, bool maximize) -> ()");
  m.def(
      "low_rank_project(Tensor[] matrix, Tensor[] projector, Tensor? grad_scale, Tensor(a!)[] low, "
      "Tensor(b!)[] squares, *, bool maximize) -> ()");
  m.def(
      "low_rank_rule(Tensor[] low, Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor(c!)[] exp_avg_scale, "
      "Tensor(d!)[] exp_avg_sq_scale, Tensor(e!)[] step, Tensor(f!)[] direction, Tensor(g!) step_factor, "
      "Tensor? found_inf, *, int rule, float beta1, float beta2, float eps, bool corrected_eps) -> ()");
  m.def(
      "low_rank_ratios(Tensor[] low, Tensor[] direction, Tensor[] squares, Tensor[] low_gram, Tensor(a!)[] ratios, "
      "Tensor(b!) sums, *, bool per_tensor, float? removed) -> ()");
  m.def(
      "low_rank_limit(Tensor[] low, Tensor(a!)[] direction, Tensor(b!)[] ratios, Tensor sums, "
      "Tensor(c!)[] residual_norm, Tensor? grad_scale, Tensor? found_inf, *, float scale, float? removed, "
      "bool per_tensor, float amplitude, bool amplitude_first, float growth, bool zero_norm_limits, "
      "bool maximize) -> ()");
  m.def(
      "low_rank_apply(Tensor(a!)[] param, Tensor[] projector, Tensor[] direction, Tensor[] grad, Tensor[] factors, "
      "Tensor[] low, Tensor(b!)[] compensation, Tensor[] step, int[] seeds, Tensor step_factor, Tensor lr, "
      "Tensor? grad_scale, Tensor? found_inf, *, float scale, float weight_decay, bool decay_after, "
      "float sign_scale, int rounding, bool maximize) -> ()");
  m.def(
      "adamw_step(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor(d!)[] step, Tensor lr, Tensor? grad_scale, Tensor? found_inf, *, float beta1, float beta2, float eps, "
      "float weight_decay, bool decay_after, bool corrected_eps, bool maximize) -> ()");
}

}  // namespace pykern
