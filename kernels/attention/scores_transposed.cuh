// Logits of the transposed product: rows are keys, columns are queries. The sibling of scores.cuh.
#pragma once

#include "kernels/attention/scores.cuh"

namespace pykern {

// A thread's two rows. A row that is no key ends at 0, so that nothing sees it.
struct KeyRows {
  int32_t token[2];
  int32_t end[2];
  int32_t position[2];  // read only with a window or slopes
};

// A tile's queries, in shared memory: what there is of each column.
struct QueryColumns {
  const int32_t* token;
  const int32_t* position;  // read only with a window or slopes
  const float* slope;       // in log2; read only with slopes
};

// Products become logits, up to rule.factor; where `masked`, -inf where the row's key is invisible to the query.
// `first_column` is the column of s[0] for this thread.
template <int n>
__device__ __forceinline__ void apply_rule(const ScoreRule& rule, const KeyRows& keys, const QueryColumns& queries,
                                           int first_column, bool masked, float (&s)[n]) {
  static_assert(n % 4 == 0, "scores come in fours");
  // A loop for each option: branches within one would be taken for every score.
  if (rule.transforms) {
    if (rule.softcap_log2 > 0.0f) {
#pragma unroll
      for (int j = 0; j < n; ++j) s[j] = rule.softcap_log2 * accurate_tanh(s[j] * rule.scale);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) s[j] *= rule.scale;
    }
    if (rule.slopes) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const int column = first_column + j / 4 * 8 + j % 2, i = j / 2 % 2;
        s[j] -= queries.slope[column] * static_cast<float>(queries.position[column] - keys.position[i]);
      }
    }
  }
  if (!masked) return;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const int32_t token = queries.token[first_column + j / 4 * 8 + j % 2];
    const int i = j / 2 % 2;
    if ((token < keys.token[i]) | (token >= keys.end[i])) s[j] = -INFINITY;
  }
  if (rule.window == 0) return;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const int32_t position = queries.position[first_column + j / 4 * 8 + j % 2];
    if (position - keys.position[j / 2 % 2] >= rule.window) s[j] = -INFINITY;
  }
}

}  // namespace pykern
