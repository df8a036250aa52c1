#include "common/library.h"

// Ops whose backward needs their inputs alone, and whose outputs are cheaply made again.
STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centred) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool with_weight, "
      "bool with_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("activation(Tensor gate, Tensor? up, int kind) -> Tensor");
  m.def(
      "activation_backward(Tensor grad, Tensor gate, Tensor? up, int kind) -> (Tensor grad_gate, Tensor grad_up)");
  m.def("seeded_dropout(Tensor x, Tensor seed, float p) -> Tensor");
}
