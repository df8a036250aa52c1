// The attention family's ops. Tokens are packed in depth-first order of a prefix tree: key j is
// visible to query i iff j <= i < subtree_end[j].
#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "prefix_attention_forward(Tensor q, Tensor k, Tensor v, Tensor subtree_end, float scale) -> (Tensor out, "
      "Tensor lse)");
  m.def(
      "prefix_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor subtree_end, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  // Smallest and largest subtree_end of each tile of keys, int32 [tiles, 2].
  m.def("prefix_attention_tiles(Tensor subtree_end, int tile) -> Tensor");
  m.def("gather_rows(Tensor source, Tensor rows) -> Tensor");
  m.def("gather_rows_backward(Tensor grad_out, Tensor order, Tensor offsets) -> Tensor");
}
