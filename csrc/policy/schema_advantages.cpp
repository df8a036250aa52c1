#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "group_advantages(Tensor rewards, float[] component_weights, Tensor group_ids, Tensor? lengths, "
      "Tensor? baseline_rewards, bool decompose, int transform, int baseline, int scale, int finish, int filter, "
      "int ddof, bool singleton_self, float[] settings) -> (Tensor advantages, Tensor keep, Tensor counts)");
  m.def("group_entropy(Tensor group_ids, Tensor answer_ids) -> (Tensor entropy, Tensor sizes)");
}
