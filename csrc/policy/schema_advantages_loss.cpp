#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "group_advantages(Tensor rewards, Tensor group_ids, Tensor? lengths, Tensor? baseline_rewards, int baseline, "
      "int scale, float eps, int ddof, bool singleton_self) -> (Tensor advantages, Tensor counts)");
}
