#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "disco_loss_forward(Tensor logprobs, Tensor old_logprobs, Tensor rewards, Tensor group_ids, Tensor? mask, "
      "Tensor? cu_seqlens, int score, int negatives, int positives, int divergence, bool published, float[] settings, "
      "bool with_gradient) -> (Tensor loss, Tensor coefficient, Tensor metrics)");
}
