// Schemas of the token log-probability ops; the Python functions of the same names document them.
#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "token_logprobs(Tensor logits, Tensor targets, Tensor? row_temperature, float temperature, bool entropy, "
      "bool sum_p2) -> (Tensor logprobs, Tensor entropy, Tensor sum_p2, Tensor statistics)");
  m.def(
      "token_logprobs_backward(Tensor logits, Tensor targets, Tensor? row_temperature, float temperature, "
      "Tensor statistics, Tensor entropy, Tensor sum_p2, Tensor? grad_logprobs, Tensor? grad_entropy, "
      "Tensor? grad_sum_p2) -> Tensor");
  m.def(
      "token_logprobs_backward_in_place(Tensor(a!) logits, Tensor targets, Tensor? row_temperature, "
      "float temperature, Tensor statistics, Tensor entropy, Tensor sum_p2, Tensor? grad_logprobs, "
      "Tensor? grad_entropy, Tensor? grad_sum_p2) -> ()");
  // weight and bias are the vocabulary's entries from vocabulary_start on, targets are entries of the whole one. A
  // target that isn't among the entries given counts as a logit of 0. The backward reads statistics and entropy of
  // the whole vocabulary and gives these entries' part.
  m.def(
      "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, "
      "float temperature, float softcap, bool entropy, int vocabulary_start) -> (Tensor logprobs, Tensor entropy, "
      "Tensor statistics)");
  m.def(
      "linear_token_logprobs_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
      "Tensor? row_temperature, float temperature, float softcap, Tensor statistics, Tensor entropy, "
      "Tensor? grad_logprobs, Tensor? grad_entropy, int vocabulary_start, bool hidden_needs_grad, "
      "bool weight_needs_grad, bool bias_needs_grad) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  // The same for some rows whose logits are kept from the forward to the backward, in `logits`: at least
  // round_up(rows, 64) * round_up(vocabulary, 192) floats in whatever order and type the device likes. The backward
  // adds to weight_sums, float32 [vocabulary, at least round_up(hidden_size, 64)], and to bias_sums, float64; or
  // weight_sums is bfloat16 zeros [vocabulary, hidden_size] as the weight, and receives the gradient of these rows.
  m.def(
      "linear_chunk_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, "
      "float temperature, float softcap, bool entropy, Tensor(a!) logits) -> (Tensor logprobs, Tensor entropy, "
      "Tensor statistics)");
  m.def(
      "linear_chunk_gradients(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? row_temperature, "
      "float temperature, float softcap, Tensor statistics, Tensor entropy, Tensor? grad_logprobs, "
      "Tensor? grad_entropy, Tensor(a!) logits, Tensor(b!)? weight_sums, Tensor(c!)? bias_sums, "
      "bool hidden_needs_grad) -> Tensor grad_hidden");
}
