// Where the sequences of a padded [B, T] or a packed [N] tensor begin and end.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"

namespace pykern {

// Number of sequences; `cu_seqlens` stays unread.
inline int64_t check_sequences(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens, const char* name,
                               DeviceCheck on_device) {
  if (!cu_seqlens) {
    check_dim(tokens, 2, name);
    return tokens.size(0);
  }
  check_dim(tokens, 1, name);
  on_device(*cu_seqlens, "cu_seqlens");
  check_dim(*cu_seqlens, 1, "cu_seqlens");
  check_type(*cu_seqlens, ScalarType::Long, "cu_seqlens");
  check_contiguous(*cu_seqlens, "cu_seqlens");
  STD_TORCH_CHECK(cu_seqlens->numel() > 0, "cu_seqlens: expected at least one entry");
  return cu_seqlens->numel() - 1;
}

// The first token of each sequence, and one past the last; for tensors on the CPU, whose offsets can be checked.
inline std::vector<int64_t> sequence_bounds(const Tensor& tokens, const std::optional<Tensor>& cu_seqlens,
                                            const char* name) {
  const int64_t sequences = check_sequences(tokens, cu_seqlens, name, check_cpu);
  std::vector<int64_t> starts(sequences + 1);
  if (!cu_seqlens) {
    for (int64_t row = 0; row <= sequences; ++row) starts[row] = row * tokens.size(1);
    return starts;
  }
  const int64_t* values = input<int64_t>(*cu_seqlens);
  starts.assign(values, values + sequences + 1);
  STD_TORCH_CHECK(starts.front() == 0 && starts.back() == tokens.size(0),
                  "cu_seqlens: expected to begin with 0 and end with the number of tokens, ", tokens.size(0));
  for (int64_t i = 1; i <= sequences; ++i) {
    STD_TORCH_CHECK(starts[i] >= starts[i - 1], "cu_seqlens: expected non-decreasing values, entry ", i, " is smaller");
  }
  return starts;
}

}  // namespace pykern
