#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "rollout_correction(Tensor old_logprobs, Tensor rollout_logprobs, Tensor? mask, Tensor? cu_seqlens, int weight, "
      "bool weight_mask, int criteria, bool unscored_are_one, bool normalize, float[] settings) -> (Tensor weights, "
      "Tensor keep, Tensor metrics)");
}
