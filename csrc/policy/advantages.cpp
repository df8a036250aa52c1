// Advantages of grouped rows, and the entropy of a group's answers. Every sum runs in double over the rows of a group
// in their order, so a result depends on no thread.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "policy/advantages_arguments.h"
#include "policy/advantages_estimator.h"
#include "policy/group_finder.h"

namespace pykern {
namespace {

constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;

struct Workspace {
  SortedGroups sorted;
  std::vector<double> totals, values, sums;
  std::vector<int32_t> value_rows;
  std::vector<uint8_t> signals;
  std::vector<AdvantageGroup> groups;
};

template <class T>
struct AdvantageInputs {
  const T* rewards;  // [rows, components]
  const int64_t* ids;
  const int64_t* lengths;
  const T* given;
  int64_t rows, components;
  const std::vector<double>& weights;
};

template <class T>
class GroupAdvantages {
 public:
  GroupAdvantages(const AdvantageRequest& request, const AdvantageInputs<T>& in, T* advantages, bool* keep,
                  int64_t* counts, Workspace& workspace)
      : request_(request), in_(in), advantages_(advantages), keep_(keep), counts_(counts), workspace_(workspace) {}

  void run() {
    double* const totals = at_least(workspace_.totals, in_.rows);
    if (in_.components == 1 && in_.weights[0] == 1 && !in_.given && !pays_for_length()) {
      workspace_.sorted.sort(
          in_.ids, in_.rows, [this](int64_t row) { return keep_[row] = std::isfinite(in_.rewards[row]); },
          [this, totals](int64_t row, int32_t place) { totals[place] = in_.rewards[row]; });
    } else {
      double* const by_row = at_least(workspace_.values, in_.rows);
      workspace_.sorted.sort(
          in_.ids, in_.rows, [this, by_row](int64_t row) { return keep_[row] = add_components(row, by_row[row]); },
          [totals, by_row](int64_t row, int32_t place) { totals[place] = by_row[row]; });
    }
    form_groups();
    const bool every_row = taken_ == in_.rows && counted(AdvantageCount::filtered) == 0;
    if (!request_.decompose && request_.finish == Finish::none) {
      if (!every_row) std::fill_n(advantages_, in_.rows, T{0});
      estimate(workspace_.totals.data(), workspace_.sorted.rows(), [this](int64_t row, double advantage, bool) {
        advantages_[row] = static_cast<T>(advantage);
      });
      return;
    }
    sums_ = at_least(workspace_.sums, in_.rows);
    signals_ = at_least(workspace_.signals, in_.rows);
    std::fill_n(sums_, in_.rows, 0.0);
    std::fill_n(signals_, in_.rows, uint8_t{0});
    if (request_.decompose) {
      for (int64_t component = 0; component < in_.components; ++component) add_component(component);
    } else {
      add_up(workspace_.totals.data(), workspace_.sorted.rows(), 1);
    }
    finish();
  }

 private:
  int64_t& counted(AdvantageCount what) { return counts_[static_cast<int>(what)]; }
  bool pays_for_length() const { return request_.setting(AdvantageSetting::overlong_buffer) > 0; }

  // Zero or less.
  double penalty(int64_t row) const {
    if (!pays_for_length()) return 0;
    const double buffer = request_.setting(AdvantageSetting::overlong_buffer);
    const double free = request_.setting(AdvantageSetting::overlong_longest) - buffer;
    const double length = static_cast<double>(std::max<int64_t>(in_.lengths[row], 0));
    return std::min(-(length - free) / buffer * request_.setting(AdvantageSetting::overlong_factor), 0.0);
  }

  bool has_baseline(int64_t row) const { return !in_.given || std::isfinite(static_cast<double>(in_.given[row])); }

  // The weighted sum of the components that are finite; false if there is none.
  bool add_components(int64_t row, double& total) {
    int64_t present = 0;
    double sum = 0;
    for (int64_t component = 0; component < in_.components; ++component) {
      const double reward = in_.rewards[row * in_.components + component];
      if (!std::isfinite(reward)) continue;
      ++present;
      sum += in_.weights[static_cast<size_t>(component)] * reward;
    }
    if (present == 0 || !has_baseline(row)) return false;
    missing_ += in_.components - present;
    total = sum + penalty(row);
    return true;
  }

  // Groups that the filter takes out become empty.
  void form_groups() {
    const SortedGroups& sorted = workspace_.sorted;
    const double* const totals = workspace_.totals.data();
    const double low = request_.setting(AdvantageSetting::window_low);
    const double high = request_.setting(AdvantageSetting::window_high);
    const int32_t count = sorted.groups();
    AdvantageGroup* const groups = at_least(workspace_.groups, count);
    counted(AdvantageCount::groups) = count;
    for (int32_t group = 0; group < count; ++group) {
      const int32_t begin = sorted.begin(group), end = sorted.end(group);
      groups[group].begin = begin;
      groups[group].end = end;
      if (begin == end) continue;
      const double* const first = totals + begin;
      const double* const last = totals + end;
      const bool equal = end - begin > 1 && std::all_of(first, last, [first](double total) { return total == *first; });
      counted(AdvantageCount::equal_groups) += equal;
      counted(AdvantageCount::singletons) += end - begin == 1;
      taken_ += end - begin;
      bool drop = request_.filter == Filter::equal && equal;
      if (request_.filter == Filter::difficulty) {
        const Moments rewards([&](auto visit) { std::for_each(first, last, [&](double r) { visit(r, 1.0); }); });
        drop = !(low < rewards.mean && rewards.mean < high);
      }
      if (!drop) continue;
      groups[group].end = begin;
      counted(AdvantageCount::filtered) += end - begin;
      for (int32_t place = begin; place < end; ++place) keep_[sorted.rows()[place]] = false;
    }
    counted(AdvantageCount::non_finite) = in_.rows - taken_;
    counted(AdvantageCount::missing) = missing_;
  }

  template <class Visit>
  void estimate(double* rewards, const int32_t* rows, Visit visit) {
    const AdvantageRows<T> part{rewards,   rows, in_.lengths, in_.given, workspace_.groups.data(),
                                workspace_.sorted.groups()};
    AdvantageEstimator<T>(request_, part).for_rows(visit);
  }

  void add_up(double* rewards, const int32_t* rows, double weight) {
    estimate(rewards, rows, [this, weight](int64_t row, double advantage, bool signal) {
      if (!signal) return;
      sums_[row] += weight * advantage;
      signals_[row] = 1;
    });
  }

  // Only the rows that have this component.
  void add_component(int64_t component) {
    const SortedGroups& sorted = workspace_.sorted;
    double* const values = at_least(workspace_.values, in_.rows);
    int32_t* const rows = at_least(workspace_.value_rows, in_.rows);
    int32_t next = 0;
    for (int32_t group = 0; group < sorted.groups(); ++group) {
      const int32_t begin = next;
      for (int32_t place = sorted.begin(group); place < sorted.end(group); ++place) {
        const int32_t row = sorted.rows()[place];
        const double reward = in_.rewards[row * in_.components + component];
        if (!keep_[row] || !std::isfinite(reward)) continue;
        values[next] = reward + penalty(row);
        rows[next++] = row;
      }
      workspace_.groups[static_cast<size_t>(group)].begin = begin;
      workspace_.groups[static_cast<size_t>(group)].end = next;
    }
    add_up(values, rows, in_.weights[static_cast<size_t>(component)]);
  }

  // Of the whole batch, whose rows without a signal count as zeros in it.
  void finish() {
    const double eps = request_.setting(AdvantageSetting::finish_eps);
    const bool by_token = request_.finish == Finish::token_whiten;
    double mean = 0, factor = 1;
    if (request_.finish != Finish::none) {
      const Moments batch([&](auto visit) {
        for (int64_t row = 0; row < in_.rows; ++row) {
          if (keep_[row]) visit(sums_[row], by_token ? static_cast<double>(in_.lengths[row]) : 1.0);
        }
      });
      mean = batch.mean;
      factor = batch.empty() || batch.equal() ? 0
               : by_token                     ? 1 / std::sqrt(batch.variance(request_.ddof) + eps)
                                              : 1 / (batch.deviation(request_.ddof) + eps);
    }
    for (int64_t row = 0; row < in_.rows; ++row) {
      const bool signal = signals_[row] && factor != 0 && !(by_token && in_.lengths[row] <= 0);
      advantages_[row] = signal ? static_cast<T>((sums_[row] - mean) * factor) : T{0};
    }
  }

  const AdvantageRequest& request_;
  const AdvantageInputs<T> in_;
  T* const advantages_;
  bool* const keep_;
  int64_t* const counts_;
  Workspace& workspace_;
  double* sums_ = nullptr;      // by row
  uint8_t* signals_ = nullptr;  // by row
  int64_t taken_ = 0, missing_ = 0;
};

void check_rows(int64_t rows, const char* name) {
  STD_TORCH_CHECK(rows <= kMaxRows, name, ": expected at most ", kMaxRows, " rows, got ", rows);
}

std::tuple<Tensor, Tensor, Tensor> group_advantages(Tensor rewards, std::vector<double> component_weights,
                                                    Tensor group_ids, std::optional<Tensor> lengths,
                                                    std::optional<Tensor> baseline_rewards, bool decompose,
                                                    int64_t transform, int64_t baseline, int64_t scale, int64_t finish,
                                                    int64_t filter, int64_t ddof, bool singleton_self,
                                                    std::vector<double> settings) {
  const AdvantageRequest request =
      check_advantages(rewards, component_weights, group_ids, lengths, baseline_rewards, decompose, transform, baseline,
                       scale, finish, filter, ddof, singleton_self, settings, check_cpu);
  const int64_t rows = rewards.size(0);
  check_rows(rows, "rewards");
  Tensor advantages = torch::stable::new_empty(rewards, {rows});
  Tensor keep = torch::stable::new_empty(rewards, {rows}, ScalarType::Bool);
  Tensor counts = torch::stable::new_zeros(group_ids, {static_cast<int64_t>(AdvantageCount::count)});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const AdvantageInputs<T> in{input<T>(rewards),
                                input<int64_t>(group_ids),
                                lengths ? input<int64_t>(*lengths) : nullptr,
                                baseline_rewards ? input<T>(*baseline_rewards) : nullptr,
                                rows,
                                rewards.size(1),
                                component_weights};
    with_workspace<Workspace>(rows, [&](Workspace& workspace) {
      GroupAdvantages<T>(request, in, output<T>(advantages), output<bool>(keep), output<int64_t>(counts), workspace)
          .run();
    });
  };
  if (rewards.scalar_type() == ScalarType::Double) {
    run(0.0);
  } else {
    run(0.0f);
  }
  return {advantages, keep, counts};
}

struct EntropyWorkspace {
  SortedGroups sorted;
  std::vector<int64_t> answers;
};

std::tuple<Tensor, Tensor> group_entropy(Tensor group_ids, Tensor answer_ids) {
  check_entropy(group_ids, answer_ids, check_cpu);
  const int64_t rows = group_ids.size(0);
  check_rows(rows, "group_ids");
  Tensor entropy = torch::stable::new_empty(group_ids, {rows}, ScalarType::Double);
  Tensor sizes = torch::stable::new_empty(group_ids, {rows});
  const int64_t* const answer_of = input<int64_t>(answer_ids);
  auto* const entropy_of = output<double>(entropy);
  auto* const size_of = output<int64_t>(sizes);
  with_workspace<EntropyWorkspace>(rows, [&](EntropyWorkspace& workspace) {
    SortedGroups& sorted = workspace.sorted;
    int64_t* const answers = at_least(workspace.answers, rows);
    sorted.sort(
        input<int64_t>(group_ids), rows, [](int64_t) { return true; },
        [&](int64_t row, int32_t place) { answers[place] = answer_of[row]; });
    for (int32_t group = 0; group < sorted.groups(); ++group) {
      const int32_t begin = sorted.begin(group), end = sorted.end(group);
      std::sort(answers + begin, answers + end);
      double bits = 0;
      for (int32_t first = begin, next; first < end; first = next) {
        for (next = first + 1; next < end && answers[next] == answers[first];) ++next;
        const double share = static_cast<double>(next - first) / (end - begin);
        bits += share * std::log2(1 / share);
      }
      for (int32_t place = begin; place < end; ++place) {
        entropy_of[sorted.rows()[place]] = bits;
        size_of[sorted.rows()[place]] = end - begin;
      }
    }
  });
  return {entropy, sizes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("group_advantages", TORCH_BOX(&group_advantages));
  m.impl("group_entropy", TORCH_BOX(&group_entropy));
}

}  // namespace pykern
