#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def("masked_quantile(Tensor values, Tensor? mask, float[] quantiles, int interpolation) -> Tensor");
  m.def(
      "masked_select_share(Tensor values, Tensor? mask, Tensor? candidates, int order, float share, int minimum, "
      "int seed) -> (Tensor selected, Tensor counts)");
  m.def("masked_moments(Tensor values, Tensor? mask, Tensor? centre) -> Tensor");
}
