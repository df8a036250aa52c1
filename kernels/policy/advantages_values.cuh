// What enters the statistics of a row, and the rewards that depend on those of a whole group.
#pragma once

#include <cmath>

#include "kernels/policy/advantages.h"
#include "kernels/policy/fixed_point.cuh"

namespace pykern {

constexpr double kAbsent = HUGE_VAL;  // of a row that takes no part
constexpr int kTotal = -1;            // the weighted sum of the components, in the place of one

template <class T>
class RowRewards {
 public:
  __device__ __forceinline__ explicit RowRewards(const AdvantageParams& params)
      : p_(params),
        rewards_(static_cast<const T*>(params.rewards)),
        given_(static_cast<const T*>(params.baseline_rewards)) {}

  // One component if they are decomposed, or their sum.
  __device__ __forceinline__ double part(int64_t row, int component) const {
    if (component == kTotal || !p_.decompose) return total(row);
    return takes_part(row) ? at(row, component) + penalty(row) : kAbsent;
  }
  __device__ __forceinline__ int missing(int64_t row) const {
    int count = 0;
    for (int component = 0; component < p_.components; ++component) count += !is_finite(at(row, component));
    return count;
  }
  __device__ __forceinline__ double given(int64_t row) const { return static_cast<double>(given_[row]); }
  __device__ __forceinline__ int64_t length(int64_t row) const {
    return p_.lengths && p_.lengths[row] > 0 ? p_.lengths[row] : 0;
  }

 private:
  __device__ __forceinline__ double total(int64_t row) const {
    if (!takes_part(row)) return kAbsent;
    double sum = 0;
    bool any = false;
    for (int component = 0; component < p_.components; ++component) {
      const double value = at(row, component);
      if (!is_finite(value)) continue;
      // Not fused, so that components of equal weights may change places.
      sum += __dmul_rn(p_.weights[component], value);
      any = true;
    }
    return any ? sum + penalty(row) : kAbsent;
  }
  __device__ __forceinline__ double at(int64_t row, int component) const {
    return static_cast<double>(rewards_[row * p_.components + component]);
  }
  __device__ __forceinline__ bool takes_part(int64_t row) const {
    return (p_.stage != AdvantageStage::after_filter || p_.keep[row]) && (!given_ || is_finite(given(row)));
  }
  __device__ __forceinline__ double penalty(int64_t row) const {
    if (!(p_.overlong_buffer > 0)) return 0;
    const double over = static_cast<double>(length(row)) - (p_.overlong_longest - p_.overlong_buffer);
    const double pays = -over / p_.overlong_buffer * p_.overlong_factor;
    return pays < 0 ? pays : 0;
  }

  const AdvantageParams& p_;
  const T* rewards_;
  const T* given_;
};

// C(a, k) / C(b, k) for a <= b; 0 where there is no choice of k.
__device__ __forceinline__ double choose_ratio(double a, double b, double k) {
  if (!(k >= 0 && k <= a)) return 0;
  // Both products are that ratio; the one with fewer factors is taken.
  const double factors = k < b - a ? k : b - a, over = k < b - a ? a : b - k;
  double ratio = 1;
  for (double index = 0; index < factors && ratio > 0; ++index) ratio *= (over - index) / (b - index);
  return ratio;
}

// What a correct or a wrong one of n samples gets where k of them are drawn.
__device__ __forceinline__ double pass_reward(Transform transform, double n, double correct, double k,
                                              bool is_correct) {
  const double share = k / n, wrong_others = n - correct - !is_correct;
  // The chance that the k - 1 drawn beside it are all wrong, and that k drawn without it are.
  const double beside = choose_ratio(wrong_others, n - 1, k - 1), without = choose_ratio(wrong_others, n - 1, k);
  const double marginal = is_correct ? share : share * (1 - beside);
  switch (transform) {
    case Transform::pass_at_k: return is_correct ? beside : 0;
    case Transform::pass_at_k_marginal: return marginal;
    case Transform::pass_at_k_leave_one_out: return marginal - k / (n - 1) * (1 - without);
    default: return is_correct ? share * beside : 0;
  }
}

}  // namespace pykern
