#include "common/library.h"

// `choices` and `settings` count in the order of LossChoice and LossSetting of policy/loss_arguments.h.
STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "policy_loss_forward(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, Tensor? cu_seqlens, "
      "Tensor? keep, Tensor? ref_logprobs, Tensor? anchor_logprobs, Tensor? anchor_keep, Tensor? rollout_logprobs, "
      "Tensor? rollout_weights, Tensor? entropy, Tensor? clip_low, Tensor? clip_high, Tensor? second_advantages, "
      "Tensor? advantage_weights, Tensor? token_weights, int[] choices, float[] settings, bool with_gradient) -> "
      "(Tensor loss, Tensor coefficient, Tensor entropy_coefficient, Tensor metrics)");
  m.def("policy_loss_backward(Tensor grad_loss, Tensor coefficient) -> Tensor");
  m.def(
      "policy_loss_token_weights(Tensor logprobs, Tensor? mask, Tensor? cu_seqlens, int aggregate, bool count_empty, "
      "float denominator, float horizon) -> Tensor");
}
