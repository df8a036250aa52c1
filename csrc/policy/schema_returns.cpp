#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "discounted_scan(Tensor rewards, Tensor? values, Tensor? mask, Tensor? cu_seqlens, Tensor? lambdas, float gamma, "
      "float lambda_, bool decay) -> (Tensor advantages, Tensor returns)");
  m.def("masked_whiten(Tensor values, Tensor? mask, bool shift_mean, float eps, int ddof) -> Tensor");
}
