#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def("group_statistics(Tensor values, Tensor group_ids, int ddof) -> (Tensor mean, Tensor std, Tensor count)");
}
