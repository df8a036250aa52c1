#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "optimal_token_baseline(Tensor returns, Tensor logprobs, Tensor sum_p2, Tensor group_ids, Tensor? mask, "
      "Tensor? weights, bool by_token, bool zero_tail, float eps, bool singleton_self) -> (Tensor advantages, Tensor "
      "counts)");
}
