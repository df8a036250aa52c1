// Arguments of disco_loss, that the CPU and the CUDA side share.
#pragma once

#include <vector>

#include "kernels/policy/disco.h"
#include "policy/token_batch.h"

namespace pykern {

inline void check_of_sequences(const Tensor& tensor, int64_t sequences, ScalarType type, const char* name,
                               DeviceCheck on_device) {
  on_device(tensor, name);
  check_dim(tensor, 1, name);
  check_size(tensor, 0, sequences, name);
  check_type(tensor, type, name);
  check_contiguous(tensor, name);
}

// `settings` are those of DiscoRules, in its order.
inline DiscoRules disco_rules(int64_t score, int64_t negatives, int64_t positives, int64_t divergence, bool published,
                              const std::vector<double>& settings) {
  const auto is_flag = [](int64_t value) { return value == 0 || value == 1; };
  STD_TORCH_CHECK(is_flag(score) && is_flag(negatives) && is_flag(positives) && is_flag(divergence),
                  "score, negatives, positives or divergence: unknown");
  STD_TORCH_CHECK(settings.size() == 5, "settings: expected 5 values");
  return {static_cast<DiscoScore>(score),
          static_cast<DiscoNegatives>(negatives),
          static_cast<DiscoPositives>(positives),
          static_cast<DiscoDivergence>(divergence),
          published,
          settings[0],
          settings[1],
          settings[2],
          settings[3],
          settings[4]};
}

}  // namespace pykern
