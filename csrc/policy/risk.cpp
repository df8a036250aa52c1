// RiskPO's advantages on the CPU: rows sorted by bundle and prompt, a task per bundle.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "kernels/policy/risk_rule.h"
#include "policy/risk_arguments.h"

namespace pykern {
namespace {

// The responses of one prompt in one bundle: `rows` and those behind it.
struct Prompt {
  const int64_t* rows;
  int64_t count;
  double mean, deviation;
};

template <class T>
Prompt describe(const T* rewards, const int64_t* rows, int64_t count) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(rewards[rows[i]]);
  const double mean = sum / static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i) squares += std::pow(static_cast<double>(rewards[rows[i]]) - mean, 2);
  return {rows, count, mean, count > 1 ? std::sqrt(squares / static_cast<double>(count - 1)) : 0};
}

PaperScores describe_papers(const RiskRule& rule, const std::vector<double>& scores, const double* tracked) {
  std::vector<double> sorted = scores;
  std::sort(sorted.begin(), sorted.end());
  const auto count = static_cast<int64_t>(scores.size());
  double mean = std::accumulate(scores.begin(), scores.end(), 0.0) / static_cast<double>(count), squares = 0;
  for (const double score : scores) squares += (score - mean) * (score - mean);
  double quantiles[2];
  for (int side = 0; side < 2; ++side) {
    const double of_bundle = sorted_quantile(sorted, count, side == 0 ? rule.low_level : rule.high_level);
    quantiles[side] = tracked ? joint_quantile(rule, of_bundle, tracked[side]) : of_bundle;
  }
  return {count,        sorted.front(), sorted.back(), quantiles[0],
          quantiles[1], count > 1 ? std::sqrt(squares / static_cast<double>(count - 1)) : 1};
}

// Returns the number of papers.
template <class T>
int64_t run_bundle(const RiskRule& rule, const T* rewards, const std::vector<Prompt>& prompts, const double* tracked,
                   T* advantages, T* papers) {
  int64_t count = prompts.front().count;
  const Prompt* first = &prompts.front();
  for (const Prompt& prompt : prompts) {
    count = std::min(count, prompt.count);
    if (prompt.rows[0] < first->rows[0]) first = &prompt;
  }
  std::vector<double> scores(count), distances(count);
  for (const Prompt& prompt : prompts) {
    for (int64_t j = 0; j < count; ++j) {
      const double reward = static_cast<double>(rewards[prompt.rows[j]]);
      scores[j] += reward;
      distances[j] += reward - prompt.mean;
    }
  }
  const PaperScores of_bundle = describe_papers(rule, scores, tracked);
  for (int64_t j = 0; j < count; ++j) {
    papers[first->rows[j]] = static_cast<T>(scores[j]);
    const double utility = paper_utility(rule, of_bundle, scores[j]);
    for (const Prompt& prompt : prompts) {
      const double reward = static_cast<double>(rewards[prompt.rows[j]]);
      advantages[prompt.rows[j]] =
          static_cast<T>(risk_share(rule, utility, reward, prompt.deviation, reward - prompt.mean, distances[j],
                                    static_cast<int64_t>(prompts.size())));
    }
  }
  return count;
}

template <class T>
void compute(const RiskRule& rule, const T* rewards, const int64_t* groups, const int64_t* bundles, int64_t rows,
             const double* tracked, T* advantages, T* papers, int64_t* counts) {
  std::vector<int64_t> order;
  for (int64_t row = 0; row < rows; ++row) {
    if (std::isfinite(rewards[row])) order.push_back(row);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return bundles[a] != bundles[b] ? bundles[a] < bundles[b] : groups[a] < groups[b];
  });
  std::fill(advantages, advantages + rows, T(0));
  std::fill(papers, papers + rows, std::numeric_limits<T>::quiet_NaN());

  // First place of each bundle, and one past the last.
  std::vector<int64_t> first;
  const auto taken = static_cast<int64_t>(order.size());
  for (int64_t place = 0; place < taken; ++place) {
    if (place == 0 || bundles[order[place]] != bundles[order[place - 1]]) first.push_back(place);
  }
  first.push_back(taken);
  const int64_t tasks = static_cast<int64_t>(first.size()) - 1;
  std::vector<int64_t> of_task(tasks);
  parallel_tasks(tasks, [&](int64_t task, int) {
    std::vector<Prompt> prompts;
    for (int64_t place = first[task]; place < first[task + 1];) {
      int64_t end = place + 1;
      while (end < first[task + 1] && groups[order[end]] == groups[order[place]]) ++end;
      prompts.push_back(describe(rewards, order.data() + place, end - place));
      place = end;
    }
    of_task[task] = run_bundle(rule, rewards, prompts, tracked, advantages, papers);
  });
  counts[kRiskNonFinite] = rows - taken;
  counts[kRiskBundles] = tasks;
  counts[kRiskPapers] = std::accumulate(of_task.begin(), of_task.end(), int64_t{0});
}

std::tuple<Tensor, Tensor, Tensor> risk_advantages(Tensor rewards, Tensor group_ids, Tensor bundle_ids,
                                                   std::optional<Tensor> tracked, double low_level, double high_level,
                                                   double mix, double upper_tail, bool tracked_alone, int64_t credit,
                                                   double eps) {
  check_risk(rewards, group_ids, bundle_ids, tracked, credit, check_cpu);
  const RiskRule rule{low_level, high_level, mix, upper_tail, tracked_alone, static_cast<RiskCredit>(credit), eps};
  Tensor advantages = torch::stable::empty_like(rewards);
  Tensor papers = torch::stable::empty_like(rewards);
  Tensor counts = torch::stable::new_zeros(group_ids, {kRiskCounts});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    compute<T>(rule, input<T>(rewards), input<int64_t>(group_ids), input<int64_t>(bundle_ids), rewards.size(0),
               tracked ? input<double>(*tracked) : nullptr, output<T>(advantages), output<T>(papers),
               output<int64_t>(counts));
  };
  if (rewards.scalar_type() == ScalarType::Double) {
    run(0.0);
  } else {
    run(0.0f);
  }
  return {advantages, papers, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("risk_advantages", TORCH_BOX(&risk_advantages)); }

}  // namespace pykern
