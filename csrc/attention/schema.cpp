// The attention family's ops. Tokens are packed in depth-first order of a prefix tree: key j is
// visible to query i iff j <= i < subtree_end[j] and, with a window, position[i] - position[j] < window.
#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  // window 0 and softcap 0 stand for none. max_logits is empty unless asked for, grad_sinks without sinks.
  m.def(
      "prefix_attention_forward(Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor position, Tensor bounds, "
      "Tensor order, Tensor? sinks, Tensor? alibi_slopes, float scale, int window, float softcap, "
      "bool return_max_logits, bool order_invariant) -> (Tensor out, Tensor lse, Tensor max_logits)");
  m.def(
      "prefix_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor subtree_end, Tensor position, Tensor bounds, Tensor order, Tensor? sinks, "
      "Tensor? alibi_slopes, float scale, int window, float softcap) -> (Tensor grad_q, Tensor grad_k, "
      "Tensor grad_v, Tensor grad_sinks)");
  // What each tile of tokens can see and be seen by, and the order in which to process the tiles.
  m.def("prefix_attention_tiles(Tensor subtree_end, Tensor position) -> (Tensor bounds, Tensor order)");
  m.def("gather_rows(Tensor source, Tensor rows) -> Tensor");
  m.def("gather_rows_backward(Tensor grad_out, Tensor order, Tensor offsets) -> Tensor");
}
