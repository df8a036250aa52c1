// From products of queries and keys to logits, in the registers of a thread.
//
// Accumulators of mma.m16n8k16 and of wgmma lie alike: s[4 j + 2 i + c] of lane l is row l / 4 + 8 i of its warp's 16
// rows and column 8 j + 2 (l % 4) + c. All functions here take a thread's two rows and the key of its first column.
#pragma once

#include "kernels/attention/visibility.cuh"
#include "kernels/ptx/math.cuh"

namespace pykern {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// A thread's two rows. A row that is no query has token -1, which sees nothing.
struct QueryRows {
  int32_t token[2];
  int32_t position[2];  // read only with a window or slopes
  float slope[2];       // in log2, 0 without slopes
};

// How products become logits, which are kept in units of log2, as exp2 takes them. Where nothing but a positive scale
// stands between the two, products stay as they are and `factor` is applied within exp2; else apply_rule transforms
// them and `factor` is 1.
struct ScoreRule {
  bool transforms;
  bool slopes;
  float factor;
  float scale;         // transforms: of a product; log2(e) included unless there is a softcap
  float softcap_log2;  // softcap * log2(e), or 0
  int window;
  int tokens;
  const int32_t* subtree_end;
  const int32_t* position;

  __host__ __device__ __forceinline__ explicit ScoreRule(const PrefixAttentionProblem& problem)
      : transforms(problem.softcap > 0.0f || problem.alibi_slopes != nullptr || !(problem.scale > 0.0f)),
        slopes(problem.alibi_slopes != nullptr),
        factor(transforms ? 1.0f : problem.scale * kLog2E),
        scale(problem.softcap > 0.0f ? problem.scale / problem.softcap : problem.scale * kLog2E),
        softcap_log2(problem.softcap * kLog2E),
        window(problem.window),
        tokens(static_cast<int>(problem.tokens)),
        subtree_end(problem.subtree_end),
        position(problem.position) {}

  // A key that can be read; behind the last token another one, which changes nothing: no row comes after it.
  __device__ __forceinline__ unsigned existing(int key) const {
    return static_cast<unsigned>(key < tokens ? key : tokens - 1);
  }
};

// Absolute error about 2^-22. That of the instruction for it, 2^-11, is too large here: the softcap multiplies it.
__device__ __forceinline__ float accurate_tanh(float value) {
  // Large powers make the quotient 0, small ones are lost in the sum, so neither end needs a case of its own.
  return 1.0f - __fdividef(2.0f, fast_exp2(2.0f * kLog2E * value) + 1.0f);
}

// Products become logits, up to rule.factor. `key_position(column)` is the position of the key in column
// 8 j + c from the thread's first; asked for only with slopes.
template <int n, class KeyPosition>
__device__ __forceinline__ void transform_products(const ScoreRule& rule, const QueryRows& rows,
                                                   const KeyPosition& key_position, float (&s)[n]) {
  static_assert(n % 4 == 0, "scores come in fours");
  if (!rule.transforms) return;
  if (rule.softcap_log2 > 0.0f) {
#pragma unroll
    for (int j = 0; j < n; ++j) s[j] = rule.softcap_log2 * accurate_tanh(s[j] * rule.scale);
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) s[j] *= rule.scale;
  }
  if (rule.slopes) {
#pragma unroll
    for (int j = 0; j < n / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int32_t position = key_position(8 * j + c);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          s[4 * j + 2 * i + c] -= rows.slope[i] * static_cast<float>(rows.position[i] - position);
        }
      }
    }
  }
}

// Logits of neighbouring keys become -inf where the key is invisible to the row, by its end, which `key_end(column)`
// tells, or by the window.
template <int n, class KeyEnd>
__device__ __forceinline__ void mask_logits(const ScoreRule& rule, const QueryRows& rows, int first_key,
                                            const KeyEnd& key_end, float (&s)[n]) {
  const int last_column[] = {rows.token[0] - first_key, rows.token[1] - first_key};
#pragma unroll
  for (int j = 0; j < n / 4; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int32_t end = key_end(8 * j + c);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * j + c > last_column[i] || rows.token[i] >= end) s[4 * j + 2 * i + c] = -INFINITY;
      }
    }
  }
  if (rule.window == 0) return;
#pragma unroll
  for (int j = 0; j < n / 4; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int32_t position = __ldg(rule.position + rule.existing(first_key + 8 * j + c));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (rows.position[i] - position >= rule.window) s[4 * j + 2 * i + c] = -INFINITY;
      }
    }
  }
}

template <int n>
__device__ __forceinline__ void mask_logits(const ScoreRule& rule, const QueryRows& rows, int first_key,
                                            float (&s)[n]) {
  mask_logits(
      rule, rows, first_key,
      [&](int column) { return __ldg(rule.subtree_end + rule.existing(first_key + column)); }, s);
}

// Both for neighbouring keys. `first_key` is the key of s[0] for this thread, an even number.
template <bool masked, int n>
__device__ __forceinline__ void apply_rule(const ScoreRule& rule, const QueryRows& rows, int first_key,
                                           float (&s)[n]) {
  transform_products(
      rule, rows, [&](int column) { return __ldg(rule.position + rule.existing(first_key + column)); }, s);
  if (masked) mask_logits(rule, rows, first_key, s);
}

// The derivative of the softcap where a weight is exp2(logit - lse), both in log2: 1 - tanh^2. The logit is recovered
// from the weight, so that no register has to hold it; where the weight is 0 the result is meaningless but finite.
__device__ __forceinline__ float softcap_derivative(const ScoreRule& rule, float weight, float lse_log2,
                                                    float slope_distance_log2) {
  // By instructions without the branches that subnormal operands need: fast_exp2 makes no such weights.
  const float logit = weight > 0.0f ? fast_log2(weight) + lse_log2 + slope_distance_log2 : 0.0f;
  const float tanh = __fdividef(logit, rule.softcap_log2);
  return 1.0f - tanh * tanh;
}

}  // namespace pykern
