// Tokens of a batch of sequences, padded [B, T] or packed [N] beside cu_seqlens: checks that both sides share.
#pragma once

#include <optional>

#include "common/checks.h"
#include "kernels/policy/token_batch.h"
#include "policy/sequences.h"

namespace pykern {

// Returns how many sequences there are.
inline int64_t check_batch(const Tensor& tokens, const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& cu_seqlens, const char* name, DeviceCheck on_device) {
  const ScalarType type = tokens.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, ": expected float32 or float64");
  on_device(tokens, name);
  check_contiguous(tokens, name);
  const int64_t sequences = check_sequences(tokens, cu_seqlens, name, on_device);
  if (mask) {
    on_device(*mask, "mask");
    check_type(*mask, ScalarType::Bool, "mask");
    check_contiguous(*mask, "mask");
    check_dim(*mask, tokens.dim(), "mask");
    for (int64_t dim = 0; dim < tokens.dim(); ++dim) check_size(*mask, dim, tokens.size(dim), "mask");
  }
  return sequences;
}

// Another tensor of the tokens.
inline void check_like(const Tensor& tensor, const Tensor& tokens, const char* name, DeviceCheck on_device) {
  on_device(tensor, name);
  check_type(tensor, tokens.scalar_type(), name);
  check_contiguous(tensor, name);
  check_dim(tensor, tokens.dim(), name);
  for (int64_t dim = 0; dim < tokens.dim(); ++dim) check_size(tensor, dim, tokens.size(dim), name);
}

// On the CPU the bounds of packed sequences are checked, too.
inline TokenBatch cpu_batch(const Tensor& tokens, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& cu_seqlens, int64_t sequences) {
  if (cu_seqlens) sequence_bounds(tokens, cu_seqlens, "tokens");
  const int64_t* bounds = cu_seqlens ? input<int64_t>(*cu_seqlens) : nullptr;
  return {mask ? input<uint8_t>(*mask) : nullptr, bounds, tokens.numel(), sequences,
          cu_seqlens ? 0 : tokens.size(1)};
}

inline int64_t sequence_begin(const TokenBatch& batch, int64_t sequence) {
  return batch.cu_seqlens ? batch.cu_seqlens[sequence] : sequence * batch.columns;
}

// Calls `visit(token)` for the unmasked tokens of a sequence.
template <class Visit>
void for_tokens(const TokenBatch& batch, int64_t sequence, const Visit& visit) {
  const int64_t end = sequence_begin(batch, sequence + 1);
  for (int64_t token = sequence_begin(batch, sequence); token < end; ++token) {
    if (!batch.mask || batch.mask[token]) visit(token);
  }
}

}  // namespace pykern
