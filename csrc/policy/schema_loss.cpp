#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "policy_loss_forward(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? ref_logprobs, Tensor? rollout_logprobs, bool sequence_ratio, bool weight_clip, int kl, int aggregate, "
      "float[] settings, bool with_gradient) -> (Tensor loss, Tensor coefficient, Tensor metrics)");
  m.def("policy_loss_backward(Tensor grad_loss, Tensor coefficient) -> Tensor");
}
