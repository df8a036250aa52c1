// What a paper's score is worth to RiskPO, and what of that each of its responses gets: one definition for the CPU and
// for the kernel.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PYKERN_BOTH __host__ __device__ __forceinline__
#else
#define PYKERN_BOTH inline __attribute__((always_inline))
#endif

namespace pykern {

// In the order of CREDITS in pykern/policy/risk.py.
enum class RiskCredit : int { uniform, score, std, sum_mean };

// Integers that the op counts; see METRICS in pykern/policy/risk.py.
enum RiskCount : int { kRiskNonFinite, kRiskBundles, kRiskPapers, kRiskCounts };

struct RiskRule {
  double low_level, high_level;
  double mix, upper_tail;  // zero for none
  bool tracked_alone;
  RiskCredit credit;
  double eps;
};

// Of the scores of a bundle's papers.
struct PaperScores {
  int64_t count;
  double low, high;  // smallest and largest
  double low_quantile, high_quantile, deviation;
};

// Linear between the two nearest of `count` sorted values.
template <class Sorted>
PYKERN_BOTH double sorted_quantile(const Sorted& sorted, int64_t count, double level) {
  const double rank = level * static_cast<double>(count - 1), below = floor(rank);
  const auto first = static_cast<int64_t>(below);
  const double value = sorted[first];
  return first + 1 < count ? value + (rank - below) * (sorted[first + 1] - value) : value;
}

// The bundle's quantile with the tracked one, where that is known already.
PYKERN_BOTH double joint_quantile(const RiskRule& rule, double of_bundle, double tracked) {
  if (!(tracked == tracked)) return of_bundle;
  return rule.tracked_alone ? tracked : (tracked + of_bundle) / 2;
}

PYKERN_BOTH double positive_part(double value) { return value > 0 ? value : 0; }

PYKERN_BOTH double paper_utility(const RiskRule& rule, const PaperScores& scores, double score) {
  if (scores.count > 1 && scores.low == scores.high) return 0;
  const double low = scores.low_quantile, high = scores.high_quantile;
  double utility = positive_part(score - low) - positive_part(score - high) + (low - high);
  utility /= rule.high_level - rule.low_level + rule.eps;
  if (rule.mix > 0) {
    const double lower_tail = -positive_part(low - score) / (rule.low_level + rule.eps);
    utility = (rule.mix * lower_tail + utility) / (rule.mix + 1);
  }
  if (rule.upper_tail > 0) {
    const double upper_tail = positive_part(score - high) / (1 - rule.high_level + rule.eps);
    utility = (rule.upper_tail * upper_tail + utility) / (rule.upper_tail + 1);
  }
  return utility / (scores.deviation + rule.eps);
}

// `distance`: of the reward from its prompt's mean; `distances`: the sum of those of the paper's `prompts` responses.
PYKERN_BOTH double risk_share(const RiskRule& rule, double utility, double reward, double deviation, double distance,
                              double distances, int64_t prompts) {
  switch (rule.credit) {
    case RiskCredit::score: return (reward > 0 ? 0.5 : 1.5) * utility;
    case RiskCredit::std: return utility / ((deviation > 1e-3 ? deviation : 1) + rule.eps);
    case RiskCredit::sum_mean:
      return fabs(distances) > 1e-6 ? utility * (distance / distances) : utility / static_cast<double>(prompts);
    default: return utility;
  }
}

}  // namespace pykern

#undef PYKERN_BOTH
