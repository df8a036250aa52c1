#include "common/library.h"

namespace pykern {

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "low_rank_adam_step(Tensor(a!) param, Tensor grad, Tensor projector, Tensor(b!) exp_avg, "
      "Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor(e!)? residual_norm, Tensor lr, *, float beta1, float beta2, "
      "float eps, float weight_decay, float scale, bool right, bool decay_after, bool corrected_eps, "
      "bool scaled_residual, bool maximize) -> ()");
  m.def(
      "adam_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, "
      "Tensor lr, *, float beta1, float beta2, float eps, float weight_decay, bool decay_after, "
      "bool corrected_eps, bool maximize) -> ()");
  m.def(
      "low_rank_adam_phase(Tensor low, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor(c!)? exp_avg_scale, "
      "Tensor(d!)? exp_avg_sq_scale, Tensor(e!) step, *, float beta1, float beta2, float eps, bool corrected_eps, "
      "bool maximize) -> Tensor");
}

}  // namespace pykern
