// The parts of an advantage, in the order of their tables in pykern/policy/estimators.py. The CPU and the CUDA side
// share them.
#pragma once

namespace pykern {

enum class Transform : int {
  none,
  min_max,
  best_gap,
  pass_at_k,
  pass_at_k_marginal,
  relative_length,
  pass_at_k_leave_one_out,
  pass_at_k_minus_one,
  count
};
enum class Baseline : int {
  none,
  group_mean,
  leave_one_out,
  length_weighted,
  given,
  batch_mean,
  groups_mean,
  count
};
enum class Scale : int {
  none,
  group_std,
  leave_one_out_std,
  token_std,
  group_mean,
  beta,
  batch_std,
  centred_batch_std,
  groups_std,
  nonzero_share,
  valid_share,
  count
};
enum class Finish : int { none, batch_std, token_whiten, count };
enum class Filter : int { none, equal, difficulty, count };

// In the order of the floats that pykern/policy/advantages.py passes.
enum class AdvantageSetting : int {
  eps,
  finish_eps,
  k,
  overlong_longest,
  overlong_buffer,  // zero: no penalty
  overlong_factor,
  relative_length,
  fallback,
  window_low,
  window_high,
  count
};

// In the order of METRICS in pykern/policy/advantages.py.
enum class AdvantageCount : int { non_finite, missing, groups, equal_groups, singletons, filtered, count };

constexpr int kMaxComponents = 16;

// Whether the rewards of a row's own group decide its advantage: then a group whose rewards are equal has none, and a
// single reward goes by the singleton rule.
constexpr bool transforms_by_group(Transform transform) {
  return transform != Transform::none && transform != Transform::min_max;
}
constexpr bool is_grouped(Transform transform, Baseline baseline, Scale scale) {
  return transforms_by_group(transform) || baseline == Baseline::group_mean || baseline == Baseline::leave_one_out ||
         baseline == Baseline::length_weighted || scale == Scale::group_std || scale == Scale::leave_one_out_std ||
         scale == Scale::token_std || scale == Scale::group_mean || scale == Scale::beta;
}
constexpr bool weighs_by_length(Baseline baseline, Scale scale) {
  return baseline == Baseline::length_weighted || scale == Scale::token_std;
}

}  // namespace pykern
