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
  if (rule.transforms) {
#pragma unroll
    for (int j = 0; j < n / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = first_column + 8 * j + c;
        const int32_t position = rule.slopes ? queries.position[column] : 0;
        const float slope = rule.slopes ? queries.slope[column] : 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = s[4 * j + 2 * i + c];
          score *= rule.scale;
          if (rule.softcap_log2 > 0.0f) score = rule.softcap_log2 * accurate_tanh(score);
          if (rule.slopes) score -= slope * static_cast<float>(position - keys.position[i]);
        }
      }
    }
  }
  if (masked) {
#pragma unroll
    for (int j = 0; j < n / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = first_column + 8 * j + c;
        const int32_t token = queries.token[column];
        const int32_t position = rule.window > 0 ? queries.position[column] : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          bool sees = keys.token[i] <= token && token < keys.end[i];
          if (rule.window > 0) sees = sees && position - keys.position[i] < rule.window;
          if (!sees) s[4 * j + 2 * i + c] = -INFINITY;
        }
      }
    }
  }
}

}  // namespace pykern
