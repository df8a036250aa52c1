// Weights of pairs of queries and keys, made again in the backward from products and lse.
#pragma once

#include "kernels/attention/scores.cuh"

namespace pykern {

// `position` is read with a window or slopes only.
struct PairQuery {
  int token, position;
  float slope;  // in log2
  float lse;    // in log2, see lse_in_log2
};
struct PairKey {
  int token, end, position;
};

// A row that sees nothing gets infinity, of which every weight is 0.
__device__ __forceinline__ float lse_in_log2(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2E; }

// exp2(logit - lse), and what turns the gradient of the logit into that of scale * product. Selected, not multiplied,
// where the pair is invisible.
template <bool masked, bool transforms>
__device__ __forceinline__ float pair_weight(const ScoreRule& rule, float product, const PairQuery& query,
                                             const PairKey& key, float& derivative) {
  derivative = 1.0f;
  float logit = product * rule.factor;
  if (transforms) {
    logit = product * rule.scale;
    if (rule.softcap_log2 > 0.0f) {
      const float tanh = accurate_tanh(logit);
      logit = rule.softcap_log2 * tanh;
      derivative = 1.0f - tanh * tanh;
    }
    if (rule.slopes) logit -= query.slope * static_cast<float>(query.position - key.position);
  }
  const float weight = fast_exp2(logit - query.lse);
  if (!masked) return weight;
  const bool in_window = rule.window == 0 || query.position - key.position < rule.window;
  return key.token <= query.token && query.token < key.end && in_window ? weight : 0.0f;
}

}  // namespace pykern
