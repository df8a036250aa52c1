// One estimator over the rows of all groups: transform, statistics of groups and batch, then each row's distance from
// its baseline over its scale. Group by group, each of which lies in the nearest cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "policy/advantages_arguments.h"
#include "policy/advantages_statistics.h"
#include "policy/group_finder.h"

namespace pykern {

struct AdvantageGroup {
  int32_t begin, end;  // places
  double low, high, mean, squares;
  bool signal;  // false: its advantages are exactly zero
  bool fallen;  // back on group_mean and group_std
  // advantage = gain * (reward - offset) + constant
  double offset, gain, constant;

  int32_t size() const { return end - begin; }
};

// The rewards of the rows that take part, by place, and what belongs to their rows.
template <class T>
struct AdvantageRows {
  double* rewards;  // transformed in place
  const int32_t* rows;
  const int64_t* lengths;  // by row; null if not needed
  const T* given;          // by row; null if not needed
  AdvantageGroup* groups;
  int32_t group_count;
};

template <class T>
class AdvantageEstimator {
 public:
  AdvantageEstimator(const AdvantageRequest& request, const AdvantageRows<T>& rows)
      : request_(request),
        rows_(rows),
        eps_(request.setting(AdvantageSetting::eps)),
        by_length_(weighs_by_length(request.baseline, request.scale)),
        grouped_(is_grouped(request.transform, request.baseline, request.scale)) {
    for (int32_t group = 0; group < rows_.group_count; ++group) size_ += rows_.groups[group].size();
    if (size_ == 0) return;
    if (request_.transform == Transform::min_max) spread_between_zero_and_one();
    for_groups([&](AdvantageGroup& group) {
      if (transforms_by_group(request_.transform) && group.size() > 1) transform(group);
      add_up(group);
    });
    take_batch();
    for_groups([&](AdvantageGroup& group) { relate(group); });
    if (request_.scale == Scale::centred_batch_std) scale_by_centred_batch();
  }

  // visit(row, advantage, signal)
  template <class Visit>
  void for_rows(Visit visit) const {
    for_groups([&](const AdvantageGroup& group) {
      if (!group.signal || !batch_signal_) {
        for (int32_t place = group.begin; place < group.end; ++place) visit(rows_.rows[place], 0.0, false);
      } else if (request_.scale == Scale::leave_one_out_std && group.size() > 1) {
        const Others others(rows_.rewards + group.begin, group);
        for (int32_t place = group.begin; place < group.end; ++place) {
          const double deviation = others.deviation(rows_.rewards[place]);
          visit(rows_.rows[place], distance(group, place) / (deviation > 0 ? deviation + eps_ : 1), true);
        }
      } else {
        for (int32_t place = group.begin; place < group.end; ++place) {
          visit(rows_.rows[place], distance(group, place), true);
        }
      }
    });
  }

 private:
  // The rewards of a group but one.
  class Others {
   public:
    Others(const double* rewards, const AdvantageGroup& group) : rewards_(rewards), group_(group) {
      for (int32_t row = 0; row < group.size(); ++row) {
        lowest_ += rewards[row] == group.low;
        highest_ += rewards[row] == group.high;
      }
    }

    // Zero only where they are equal.
    double deviation(double one) const {
      const int32_t n = group_.size();
      if (n == 2 || (one == group_.high && lowest_ == n - 1) || (one == group_.low && highest_ == n - 1)) return 0;
      const double distance = one - group_.mean;
      const double rest = group_.squares - distance * distance * n / (n - 1);
      // Where one row holds nearly all of the squares, what the subtraction leaves is rounding.
      return std::sqrt((rest > 1e-6 * group_.squares ? rest : squares_without(one)) / (n - 2));
    }

   private:
    double squares_without(double one) const {
      const int32_t n = group_.size();
      int32_t skipped = 0;
      while (rewards_[skipped] != one) ++skipped;
      double sum = 0, squares = 0;
      for (int32_t row = 0; row < n; ++row) sum += row == skipped ? 0 : rewards_[row];
      const double mean = sum / (n - 1);
      for (int32_t row = 0; row < n; ++row) {
        if (row != skipped) squares += (rewards_[row] - mean) * (rewards_[row] - mean);
      }
      return squares;
    }

    const double* rewards_;
    const AdvantageGroup& group_;
    int32_t lowest_ = 0, highest_ = 0;
  };

  template <class Visit>
  void for_groups(Visit visit) const {
    for (int32_t group = 0; group < rows_.group_count; ++group) {
      if (rows_.groups[group].size() > 0) visit(rows_.groups[group]);
    }
  }

  double length(int32_t place) const {
    return static_cast<double>(std::max<int64_t>(rows_.lengths[rows_.rows[place]], 0));
  }

  double distance(const AdvantageGroup& group, int32_t place) const {
    const bool given = rows_.given && !group.fallen;
    const double offset = given ? static_cast<double>(rows_.given[rows_.rows[place]]) : group.offset;
    return group.gain * (rows_.rewards[place] - offset) + group.constant;
  }

  // --- transforms ---------------------------------------------------------------------------------------------------

  void spread_between_zero_and_one() {
    double low = std::numeric_limits<double>::infinity(), high = -low;
    for_groups([&](const AdvantageGroup& group) {
      for (int32_t place = group.begin; place < group.end; ++place) {
        low = std::min(low, rows_.rewards[place]);
        high = std::max(high, rows_.rewards[place]);
      }
    });
    for_groups([&](const AdvantageGroup& group) {
      for (int32_t place = group.begin; place < group.end; ++place) {
        rows_.rewards[place] = high > low ? (rows_.rewards[place] - low) / (high - low) : 0;
      }
    });
  }

  void transform(AdvantageGroup& group) const {
    double* const first = rows_.rewards + group.begin;
    double* const last = rows_.rewards + group.end;
    switch (request_.transform) {
      case Transform::relative_length: return shorten(group);
      case Transform::best_gap: {
        const Moments rewards([&](auto visit) { std::for_each(first, last, [&](double r) { visit(r, 1.0); }); });
        group.squares = rewards.squares;
        double second = -std::numeric_limits<double>::infinity();
        double* const best = std::max_element(first, last);
        for (double* one = first; one != last; ++one) second = one == best ? second : std::max(second, *one);
        const double gap = *best - second;
        std::fill(first, last, 0.0);
        *best = gap;
        return;
      }
      default: return count_correct(first, last);
    }
  }

  void shorten(const AdvantageGroup& group) const {
    const double share = request_.setting(AdvantageSetting::relative_length);
    double longest = 1;
    for (int32_t place = group.begin; place < group.end; ++place) longest = std::max(longest, length(place));
    const Moments rewards([&](auto visit) {
      for (int32_t place = group.begin; place < group.end; ++place) visit(rows_.rewards[place], 1.0);
    });
    for (int32_t place = group.begin; place < group.end; ++place) {
      rows_.rewards[place] -= rewards.mean * share * (length(place) / longest);
    }
  }

  // pass@k: a reward above zero is correct. All that counts of the others is how many of them are.
  void count_correct(double* first, double* last) const {
    const int64_t n = last - first, k = static_cast<int64_t>(request_.setting(AdvantageSetting::k));
    const int64_t wrong = std::count_if(first, last, [](double reward) { return !(reward > 0); });
    const double share = static_cast<double>(k) / static_cast<double>(n);
    const double others_share = static_cast<double>(k) / static_cast<double>(n - 1);
    // Of k drawn with a correct sample, or with a wrong one: the chance that the k - 1 others are all wrong.
    const double beside_correct = choose_ratio(wrong, n - 1, k - 1);
    const double beside_wrong = choose_ratio(wrong - 1, n - 1, k - 1);
    double of_correct = 0, of_wrong = 0;
    switch (request_.transform) {
      case Transform::pass_at_k: of_correct = beside_correct; break;
      case Transform::pass_at_k_minus_one: of_correct = share * beside_correct; break;
      case Transform::pass_at_k_leave_one_out:
        // Less pass@k of the others.
        of_correct = share - others_share * (1 - choose_ratio(wrong, n - 1, k));
        of_wrong = share * (1 - beside_wrong) - others_share * (1 - choose_ratio(wrong - 1, n - 1, k));
        break;
      default:
        of_correct = share;
        of_wrong = share * (1 - beside_wrong);
    }
    std::transform(first, last, first, [&](double reward) { return reward > 0 ? of_correct : of_wrong; });
  }

  // --- statistics ---------------------------------------------------------------------------------------------------

  void add_up(AdvantageGroup& group) {
    const double* const rewards = rows_.rewards;
    double low = rewards[group.begin], high = low, sum = 0;
    for (int32_t place = group.begin; place < group.end; ++place) {
      const double reward = rewards[place];
      sum += reward;
      low = reward < low ? reward : low;
      high = reward > high ? reward : high;
    }
    group.low = low;
    group.high = high;
    group.mean = mean_within(sum, group.size(), low, high);
    const bool of_gaps = request_.transform != Transform::best_gap || request_.scale == Scale::leave_one_out_std;
    if (!of_gaps && group.size() > 1) return;  // the squares are those of the rewards
    double squares = 0;
    for (int32_t place = group.begin; place < group.end; ++place) {
      const double distance = rewards[place] - group.mean;
      squares += distance * distance;
    }
    group.squares = squares;
  }

  // Moments of one value of each group.
  template <class Value>
  Moments over_groups(Value value) const {
    return Moments([&](auto visit) { for_groups([&](const AdvantageGroup& group) { visit(value(group), 1.0); }); });
  }
  // Moments of one value of each row.
  template <class Value>
  Moments over_rows(Value value) const {
    return Moments([&](auto visit) {
      for_groups([&](const AdvantageGroup& group) {
        for (int32_t place = group.begin; place < group.end; ++place) visit(value(group, place), 1.0);
      });
    });
  }

  void take_batch() {
    if (request_.baseline == Baseline::batch_mean || request_.scale == Scale::batch_std) {
      const Moments batch = over_rows([&](const AdvantageGroup&, int32_t place) { return rows_.rewards[place]; });
      baseline_mean_ = batch.mean;
      if (request_.scale == Scale::batch_std) gain_ = 1 / (batch.deviation(request_.ddof) + eps_);
      batch_signal_ &= !batch.equal() || (batch.weight == 1 && request_.baseline != Baseline::batch_mean);
    }
    if (request_.baseline == Baseline::groups_mean || request_.scale == Scale::groups_std) {
      const Moments means = over_groups([](const AdvantageGroup& group) { return group.mean; });
      if (request_.baseline == Baseline::groups_mean) baseline_mean_ = means.mean;
      if (request_.scale == Scale::groups_std) gain_ = 1 / (means.deviation(request_.ddof) + eps_);
      batch_signal_ &= !means.equal() || (means.weight == 1 && request_.baseline != Baseline::groups_mean);
    }
    if (request_.scale == Scale::nonzero_share) {
      int64_t nonzero = 0;
      for_groups([&](const AdvantageGroup& group) {
        for (int32_t place = group.begin; place < group.end; ++place) nonzero += rows_.rewards[place] != 0;
      });
      gain_ = nonzero > 0 ? static_cast<double>(size_) / static_cast<double>(nonzero) : 0;
    }
    if (request_.scale == Scale::valid_share) {
      int64_t valid = 0;
      for_groups([&](const AdvantageGroup& group) {
        const bool is_valid = group.size() == 1 ? request_.singleton_self : group.low < group.high;
        valid += is_valid ? group.size() : 0;
      });
      gain_ = valid > 0 ? 1 / (static_cast<double>(valid) / static_cast<double>(size_) + eps_) : 0;
    }
    if (request_.scale == Scale::beta) {
      const Moments shares = over_groups(share);
      prior_ = shares.weight > 1 ? BetaPrior(shares.mean, shares.variance(1)) : BetaPrior(0, 1);
    }
  }

  // Rewards of a Beta density lie between 0 and 1; a single one says nothing about its group.
  static double share(const AdvantageGroup& group) {
    return group.size() > 1 ? std::min(std::max(group.mean, 0.0), 1.0) : 0;
  }

  double deviation(const AdvantageGroup& group) const {
    return group.size() > 1 ? std::sqrt(group.squares / (group.size() - request_.ddof)) : 1;
  }

  // --- one group against its baseline, over its scale ----------------------------------------------------------------

  void relate(AdvantageGroup& group) const {
    const int32_t n = group.size();
    Moments tokens([](auto) {});
    if (by_length_) {
      tokens = Moments([&](auto visit) {
        for (int32_t place = group.begin; place < group.end; ++place) visit(rows_.rewards[place], length(place));
      });
    }
    const bool equal = by_length_ ? tokens.empty() || tokens.equal() : group.low == group.high;
    group.signal = !grouped_ || (n == 1 ? request_.singleton_self : !equal);
    if (!group.signal) return;

    group.offset = 0;
    group.gain = gain_;
    group.constant = 0;
    group.fallen = false;
    const bool alone = n == 1;
    switch (request_.baseline) {
      case Baseline::group_mean: group.offset = alone ? 0 : group.mean; break;
      case Baseline::leave_one_out:
        group.offset = alone ? 0 : group.mean;
        group.gain *= alone ? 1 : static_cast<double>(n) / (n - 1);
        break;
      case Baseline::length_weighted: group.offset = alone ? 0 : tokens.mean; break;
      case Baseline::batch_mean: group.offset = baseline_mean_; break;
      case Baseline::groups_mean:
        group.gain = 0;
        group.constant = gain_ * (group.mean - baseline_mean_);
        break;
      default: break;
    }

    double factor = 1;
    if (request_.scale == Scale::group_std ||
        (alone && (request_.scale == Scale::leave_one_out_std || request_.scale == Scale::token_std))) {
      factor = 1 / (deviation(group) + eps_);
    } else if (request_.scale == Scale::token_std) {
      factor = 1 / (std::sqrt(tokens.variance(0)) + eps_);
      if (reaches_fallback(group, factor)) {
        group.fallen = true;
        group.offset = group.mean;
        group.gain = gain_;
        group.constant = 0;
        factor = 1 / (deviation(group) + eps_);
      }
    } else if (request_.scale == Scale::group_mean) {
      factor = group.mean > 0 ? 1 / (group.mean + eps_) : 0;
    } else if (request_.scale == Scale::beta) {
      factor = prior_.inverse_density(share(group));
    }
    group.gain *= factor;
    group.constant *= factor;
  }

  bool reaches_fallback(const AdvantageGroup& group, double factor) const {
    const double fallback = request_.setting(AdvantageSetting::fallback);
    for (int32_t place = group.begin; place < group.end; ++place) {
      if (std::fabs(distance(group, place) * factor) >= fallback) return true;
    }
    return false;
  }

  void scale_by_centred_batch() {
    const Moments batch = over_rows([&](const AdvantageGroup& group, int32_t place) {
      return group.signal ? distance(group, place) : 0;
    });
    const double factor = 1 / (batch.deviation(request_.ddof) + eps_);
    batch_signal_ &= !batch.equal() || batch.weight == 1;
    for_groups([&](AdvantageGroup& group) {
      group.gain *= factor;
      group.constant *= factor;
    });
  }

  const AdvantageRequest& request_;
  const AdvantageRows<T> rows_;
  const double eps_;
  const bool by_length_, grouped_;
  int64_t size_ = 0;
  bool batch_signal_ = true;
  double baseline_mean_ = 0, gain_ = 1;
  BetaPrior prior_{0, 0};
};

}  // namespace pykern
