// What rollout_correction measures of each sequence, and the metrics that follow: the same on the CPU and on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PYKERN_BOTH_SIDES __host__ __device__ __forceinline__
#else
#define PYKERN_BOTH_SIDES inline
#endif

namespace pykern {

// In the order of WEIGHTS and CRITERIA in pykern/policy/rollout.py.
enum class RolloutWeight : int { none, token, sequence, geometric };
enum Criterion : int {
  kTokenK1, kTokenK2, kTokenK3,
  kSumK1, kSumK2, kSumK3,
  kMeanK1, kMeanK2, kMeanK3,
  kMaxK2, kMaxK3,
  kCriteria
};
constexpr int kTokenCriteria = 3;

struct RolloutRules {
  RolloutWeight weight;
  bool weight_mask;       // outside of its bounds, a weight is zero; otherwise it is the bound
  bool unscored_are_one;  // a token whose rollout log-probability is NaN has ratio one
  bool normalize;
  unsigned criteria;      // bits, by Criterion
  double low[kCriteria], high[kCriteria];
  double weight_low, weight_high;
  double limit;     // of log-ratios, either way
  double veto_log;  // -inf: none
};

// Sums over the tokens of a sequence.
enum TokenSum : int {
  kTokens, kOld, kRollout, kLogRatio, kK3, kSquaredRatio, kLimitedK1, kLimitedK2, kLimitedK3, kVetoes, kTokenSums
};

// Of the second look at its tokens.
enum WeightSum : int { kWeights, kSquaredWeights, kHigh, kLow, kRejectedTokens, kRejectedOfCriterion,
                       kWeightSums = kRejectedOfCriterion + kTokenCriteria };

// What a sequence adds to the metrics. Two are the largest of all sequences, two the smallest; the rest are sums.
enum RolloutColumn : int {
  kColTokens, kColSequences,
  kColKl, kColK3, kColSquaredRatio, kColSquaredSequenceRatio,
  kColOldLogPpl, kColOldPpl, kColRolloutLogPpl, kColRolloutPpl, kColDiff, kColAbsDiff, kColPplRatio,
  kColWeights, kColSquaredWeights, kColSequenceWeights, kColHigh, kColLow,
  kColRejected, kColRejectedSequences, kColVetoed,
  kColRejectedOf, kColRejectedSequencesOf = kColRejectedOf + kCriteria,
  kColLargestDiff = kColRejectedSequencesOf + kCriteria, kColLargestWeight,
  kColSmallestDiff, kColSmallestWeight,
  kColumns
};
constexpr int kPaddedColumns = 64;
static_assert(kColumns <= kPaddedColumns, "two columns for each lane of a warp");

// In the order of METRICS in pykern/policy/rollout.py, then two for each criterion.
enum RolloutMetric : int {
  kWeightMean, kWeightStd, kWeightMax, kWeightMin, kFractionHigh, kFractionLow, kEffectiveSampleSize, kNormalization,
  kRejectedFraction, kRejectedSequenceFraction, kVetoedFraction,
  kKl, kK3Kl, kTrainingPpl, kTrainingLogPpl, kRolloutPpl, kRolloutLogPpl,
  kLogPplDiff, kLogPplAbsDiff, kLogPplDiffMax, kLogPplDiffMin, kPplRatio, kChi2Token, kChi2Seq,
  kRejectedByCriterion,
  kRolloutMetrics = kRejectedByCriterion + 2 * kCriteria
};

PYKERN_BOTH_SIDES double rollout_identity(int column) {
  return column < kColLargestDiff ? 0 : column < kColSmallestDiff ? -HUGE_VAL : HUGE_VAL;
}
PYKERN_BOTH_SIDES double rollout_join(int column, double a, double b) {
  if (column < kColLargestDiff) return a + b;
  if (column < kColSmallestDiff) return b > a || b != b ? b : a;
  return b < a || b != b ? b : a;
}

template <class T>
PYKERN_BOTH_SIDES T limited(T value, double limit) {
  const T bound = static_cast<T>(limit);
  return value < -bound ? -bound : value > bound ? bound : value;
}

// exp(d) - d - 1, which cancels near zero; `ratio` is exp(d).
PYKERN_BOTH_SIDES float k3_of(float d, float ratio) { return d > -0.5f && d < 0.5f ? expm1f(d) - d : ratio - d - 1; }
PYKERN_BOTH_SIDES double k3_of(double d, double ratio) { return d > -0.5 && d < 0.5 ? expm1(d) - d : ratio - d - 1; }
PYKERN_BOTH_SIDES float exponential(float value) { return expf(value); }
PYKERN_BOTH_SIDES double exponential(double value) { return exp(value); }

template <class T>
PYKERN_BOTH_SIDES T log_ratio(const RolloutRules& rules, T old, T rollout) {
  return rules.unscored_are_one && rollout != rollout ? T(0) : old - rollout;
}

// Adds a token to the sums, and to the largest k2 and k3 of its sequence. A NaN shows in the sums alone.
template <class T>
PYKERN_BOTH_SIDES void measure_token(const RolloutRules& rules, T old, T rollout, double (&sums)[kTokenSums],
                                     T (&largest)[2]) {
  const T d = log_ratio(rules, old, rollout), within = limited(d, rules.limit);
  const T ratio = exponential(d), limited_ratio = within == d ? ratio : exponential(within);
  const T k2 = within * within / 2, k3 = k3_of(within, limited_ratio);
  sums[kTokens] += 1;
  sums[kOld] += static_cast<double>(old);
  sums[kRollout] += static_cast<double>(rules.unscored_are_one && rollout != rollout ? old : rollout);
  sums[kLogRatio] += static_cast<double>(d);
  sums[kK3] += static_cast<double>(k3_of(d, ratio));
  sums[kSquaredRatio] += static_cast<double>(limited_ratio) * static_cast<double>(limited_ratio);
  sums[kLimitedK1] -= static_cast<double>(within);
  sums[kLimitedK2] += static_cast<double>(k2);
  sums[kLimitedK3] += static_cast<double>(k3);
  sums[kVetoes] += static_cast<double>(d) < rules.veto_log ? 1 : 0;
  largest[0] = k2 > largest[0] ? k2 : largest[0];
  largest[1] = k3 > largest[1] ? k3 : largest[1];
}

// What holds for a whole sequence.
struct SequenceVerdict {
  unsigned failed;    // criteria, bits
  bool keep, vetoed;  // `keep` but for what its single tokens say
  double raw_weight;  // its own weight before the bounds
};

PYKERN_BOTH_SIDES bool passes(const RolloutRules& rules, int criterion, double statistic) {
  return statistic >= rules.low[criterion] && statistic <= rules.high[criterion];
}

PYKERN_BOTH_SIDES SequenceVerdict judge_sequence(const RolloutRules& rules, const double (&sums)[kTokenSums],
                                                 double largest_k2, double largest_k3) {
  const double tokens = sums[kTokens] > 0 ? sums[kTokens] : 1;
  const double nan_k2 = sums[kLimitedK2] == sums[kLimitedK2] ? largest_k2 : sums[kLimitedK2];
  const double nan_k3 = sums[kLimitedK3] == sums[kLimitedK3] ? largest_k3 : sums[kLimitedK3];
  const double statistics[kCriteria] = {0, 0, 0,
                                        sums[kLimitedK1], sums[kLimitedK2], sums[kLimitedK3],
                                        sums[kLimitedK1] / tokens, sums[kLimitedK2] / tokens, sums[kLimitedK3] / tokens,
                                        nan_k2, nan_k3};
  SequenceVerdict verdict{0, true, sums[kVetoes] > 0, 1};
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int criterion = kTokenCriteria; criterion < kCriteria; ++criterion) {
    const bool asked = (rules.criteria & (1u << criterion)) != 0;
    if (asked && !passes(rules, criterion, statistics[criterion])) verdict.failed |= 1u << criterion;
  }
  verdict.keep = verdict.failed == 0 && !verdict.vetoed;
  if (rules.weight == RolloutWeight::sequence) verdict.raw_weight = exp(limited(sums[kLogRatio], rules.limit));
  if (rules.weight == RolloutWeight::geometric) {
    verdict.raw_weight = exp(limited(sums[kLogRatio] / tokens, rules.limit));
  }
  return verdict;
}

template <class T>
PYKERN_BOTH_SIDES T bounded_weight(const RolloutRules& rules, T raw) {
  const T low = static_cast<T>(rules.weight_low), high = static_cast<T>(rules.weight_high);
  if (rules.weight_mask) return raw >= low && raw <= high ? raw : T(0);
  return raw < low ? low : raw > high ? high : raw;
}

PYKERN_BOTH_SIDES double low_bound(const RolloutRules& rules) {
  return rules.weight_low > 0 ? rules.weight_low : 1 / rules.weight_high;
}

// The verdict on a token: its weight, and whether it stays. Adds it to the sums, and to the range of weights.
template <class T>
struct TokenVerdict {
  T weight;
  bool keep;
};
template <class T>
PYKERN_BOTH_SIDES TokenVerdict<T> judge_token(const RolloutRules& rules, const SequenceVerdict& sequence, T old,
                                              T rollout, double (&sums)[kWeightSums], T (&range)[2]) {
  const T within = limited(log_ratio(rules, old, rollout), rules.limit), ratio = exponential(within);
  TokenVerdict<T> verdict{T(1), sequence.keep};
  const double statistics[kTokenCriteria] = {-static_cast<double>(within), static_cast<double>(within * within / 2),
                                             static_cast<double>(k3_of(within, ratio))};
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int criterion = 0; criterion < kTokenCriteria; ++criterion) {
    const bool asked = (rules.criteria & (1u << criterion)) != 0;
    const bool fails = asked && !passes(rules, criterion, statistics[criterion]);
    sums[kRejectedOfCriterion + criterion] += fails ? 1 : 0;
    verdict.keep = verdict.keep && !fails;
  }
  sums[kRejectedTokens] += verdict.keep ? 0 : 1;
  if (rules.weight == RolloutWeight::token) {
    verdict.weight = bounded_weight(rules, ratio);
    sums[kHigh] += static_cast<double>(ratio) > rules.weight_high ? 1 : 0;
    sums[kLow] += static_cast<double>(ratio) < low_bound(rules) ? 1 : 0;
    const auto weight = static_cast<double>(verdict.weight);
    sums[kWeights] += weight;
    sums[kSquaredWeights] += weight * weight;
    range[0] = verdict.weight > range[0] ? verdict.weight : range[0];
    range[1] = verdict.weight < range[1] ? verdict.weight : range[1];
  }
  return verdict;
}

// A sequence's row of columns. Returns its own weight.
PYKERN_BOTH_SIDES double fill_columns(const RolloutRules& rules, const double (&sums)[kTokenSums],
                                      const SequenceVerdict& verdict, const double (&weights)[kWeightSums],
                                      double largest_weight, double smallest_weight, double* columns) {
  const double tokens = sums[kTokens];
  const bool any = tokens > 0;
  const bool own = rules.weight == RolloutWeight::sequence || rules.weight == RolloutWeight::geometric;
  const double weight = own ? bounded_weight(rules, verdict.raw_weight) : any ? weights[kWeights] / tokens : 1;
  for (int column = 0; column < kPaddedColumns; ++column) columns[column] = rollout_identity(column);
  if (!any) return weight;
  const double old = sums[kOld] / tokens, rollout = sums[kRollout] / tokens, diff = rollout - old;
  const double product = exp(limited(sums[kLogRatio], rules.limit));
  columns[kColTokens] = tokens;
  columns[kColSequences] = 1;
  columns[kColKl] = -sums[kLogRatio];
  columns[kColK3] = sums[kK3];
  columns[kColSquaredRatio] = sums[kSquaredRatio];
  columns[kColSquaredSequenceRatio] = product * product;
  columns[kColOldLogPpl] = -old;
  columns[kColOldPpl] = exp(-old);
  columns[kColRolloutLogPpl] = -rollout;
  columns[kColRolloutPpl] = exp(-rollout);
  columns[kColDiff] = columns[kColLargestDiff] = columns[kColSmallestDiff] = diff;
  columns[kColAbsDiff] = fabs(diff);
  columns[kColPplRatio] = exp(diff);
  columns[kColWeights] = own ? weight * tokens : weights[kWeights];
  columns[kColSquaredWeights] = own ? weight * weight * tokens : weights[kSquaredWeights];
  columns[kColSequenceWeights] = weight;
  columns[kColHigh] = own ? (verdict.raw_weight > rules.weight_high ? 1 : 0) : weights[kHigh];
  columns[kColLow] = own ? (verdict.raw_weight < low_bound(rules) ? 1 : 0) : weights[kLow];
  columns[kColLargestWeight] = own ? weight : largest_weight;
  columns[kColSmallestWeight] = own ? weight : smallest_weight;
  columns[kColRejected] = weights[kRejectedTokens];
  columns[kColRejectedSequences] = weights[kRejectedTokens] > 0 ? 1 : 0;
  columns[kColVetoed] = verdict.vetoed ? 1 : 0;
  for (int criterion = 0; criterion < kCriteria; ++criterion) {
    const double rejected = criterion < kTokenCriteria          ? weights[kRejectedOfCriterion + criterion]
                            : verdict.failed & (1u << criterion) ? tokens
                                                                 : 0;
    columns[kColRejectedOf + criterion] = rejected;
    columns[kColRejectedSequencesOf + criterion] = rejected > 0 ? 1 : 0;
  }
  return weight;
}

// What the weights are divided by.
PYKERN_BOTH_SIDES double rollout_divisor(const RolloutRules& rules, const double* totals) {
  const bool tokens = rules.weight == RolloutWeight::token;
  const double count = tokens ? totals[kColTokens] : totals[kColSequences];
  const double mean = (tokens ? totals[kColWeights] : totals[kColSequenceWeights]) / (count > 0 ? count : 1);
  return rules.normalize && mean > 1e-8 ? mean : 1;
}

template <class T>
PYKERN_BOTH_SIDES void write_metrics(const RolloutRules& rules, const double* totals, T* metrics) {
  const double tokens = totals[kColTokens] > 0 ? totals[kColTokens] : 1;
  const double sequences = totals[kColSequences] > 0 ? totals[kColSequences] : 1;
  const bool any = totals[kColTokens] > 0, weighs = rules.weight != RolloutWeight::none;
  const double mean = totals[kColWeights] / tokens, square = totals[kColSquaredWeights] / tokens;
  const double variance = square - mean * mean, units = rules.weight == RolloutWeight::token ? tokens : sequences;
  const auto write = [&](int metric, double value) { metrics[metric] = static_cast<T>(value); };
  const auto range = [&](int column) { return any ? totals[column] : 0; };
  write(kWeightMean, weighs ? mean : 1);
  write(kWeightStd, weighs && variance > 0 ? sqrt(variance) : variance != variance ? variance : 0);
  write(kWeightMax, weighs ? range(kColLargestWeight) : 1);
  write(kWeightMin, weighs ? range(kColSmallestWeight) : 1);
  write(kFractionHigh, weighs ? totals[kColHigh] / units : 0);
  write(kFractionLow, weighs ? totals[kColLow] / units : 0);
  write(kEffectiveSampleSize, !weighs ? 1 : square == 0 ? 0 : mean * mean / square);
  write(kNormalization, rollout_divisor(rules, totals));
  write(kRejectedFraction, totals[kColRejected] / tokens);
  write(kRejectedSequenceFraction, totals[kColRejectedSequences] / sequences);
  write(kVetoedFraction, totals[kColVetoed] / sequences);
  write(kKl, totals[kColKl] / tokens);
  write(kK3Kl, totals[kColK3] / tokens);
  write(kTrainingPpl, totals[kColOldPpl] / sequences);
  write(kTrainingLogPpl, totals[kColOldLogPpl] / sequences);
  write(kRolloutPpl, totals[kColRolloutPpl] / sequences);
  write(kRolloutLogPpl, totals[kColRolloutLogPpl] / sequences);
  write(kLogPplDiff, totals[kColDiff] / sequences);
  write(kLogPplAbsDiff, totals[kColAbsDiff] / sequences);
  write(kLogPplDiffMax, range(kColLargestDiff));
  write(kLogPplDiffMin, range(kColSmallestDiff));
  write(kPplRatio, totals[kColPplRatio] / sequences);
  write(kChi2Token, any ? totals[kColSquaredRatio] / tokens - 1 : 0);
  write(kChi2Seq, any ? totals[kColSquaredSequenceRatio] / sequences - 1 : 0);
  for (int criterion = 0; criterion < kCriteria; ++criterion) {
    write(kRejectedByCriterion + 2 * criterion, totals[kColRejectedOf + criterion] / tokens);
    write(kRejectedByCriterion + 2 * criterion + 1, totals[kColRejectedSequencesOf + criterion] / sequences);
  }
}

}  // namespace pykern
