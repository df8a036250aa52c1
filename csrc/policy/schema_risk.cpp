#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "risk_advantages(Tensor rewards, Tensor group_ids, Tensor bundle_ids, Tensor? tracked, float low_level, "
      "float high_level, float mix, float upper_tail, bool tracked_alone, int credit, float eps) -> (Tensor "
      "advantages, Tensor papers, Tensor counts)");
}
