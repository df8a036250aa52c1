// Group-normalised advantages. Groups are found with an open-addressing hash of their ids; every sum
// runs in double over the rows in their order, so a result depends on neither threads nor hash.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "policy/arguments.h"

namespace pykern {
namespace {

// In the order of BASELINES and SCALES in pykern/policy/advantages.py.
enum class Baseline : int { none, group_mean, leave_one_out, length_weighted, given };
enum class Scale : int { none, group_std, batch_std, token_whiten };

constexpr int64_t kNone = -1;

struct Statistics {
  int64_t count = 0;
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  double weight = 0;
  double sum = 0;
  double squares = 0;  // of the distances from the mean

  void add(double value, double value_weight) {
    ++count;
    low = value < low ? value : low;
    high = value > high ? value : high;
    weight += value_weight;
    sum += value_weight * value;
  }
  bool equal() const { return low == high; }
  // Within the range of the values, which rounding might leave.
  double mean() const {
    const double quotient = weight > 0 ? sum / weight : 0;
    return quotient < low ? low : quotient > high ? high : quotient;
  }
  double variance(int ddof) const { return weight > ddof ? squares / (weight - ddof) : 0; }
};

class GroupFinder {
 public:
  explicit GroupFinder(int64_t rows) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * rows) ++bits;
    shift_ = 64 - bits;
    slots_.assign(size_t{1} << bits, {0, kNone});
  }

  int64_t find(int64_t id) {
    uint64_t mixed = static_cast<uint64_t>(id);
    mixed = (mixed ^ (mixed >> 32)) * 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ (mixed >> 29)) * 0xbf58476d1ce4e5b9u;
    for (size_t slot = mixed >> shift_;; slot = (slot + 1) & (slots_.size() - 1)) {
      if (slots_[slot].group == kNone) slots_[slot] = {id, groups_++};
      if (slots_[slot].id == id) return slots_[slot].group;
    }
  }
  int64_t groups() const { return groups_; }

 private:
  struct Slot {
    int64_t id, group;
  };
  std::vector<Slot> slots_;
  int shift_;
  int64_t groups_ = 0;
};

struct Settings {
  Baseline baseline;
  Scale scale;
  double eps;
  int ddof;
  bool singleton_self;
};

// What is divided by: the standard deviation plus eps, or for whitening the root of the variance plus eps.
double divisor(const Settings& settings, const Statistics& group, const Statistics& batch, const Statistics& tokens) {
  switch (settings.scale) {
    case Scale::none: return 1;
    case Scale::group_std: return (group.count > 1 ? std::sqrt(group.variance(settings.ddof)) : 1) + settings.eps;
    case Scale::batch_std: return (batch.count > 1 ? std::sqrt(batch.variance(settings.ddof)) : 1) + settings.eps;
    case Scale::token_whiten: return std::sqrt(tokens.variance(settings.ddof) + settings.eps);
  }
  return 1;
}

template <class T>
void compute(const T* rewards, const int64_t* ids, const int64_t* lengths, const T* given, int64_t rows,
             const Settings& settings, T* advantages, int64_t* counts) {
  const bool grouped = settings.baseline != Baseline::none && settings.baseline != Baseline::given;
  GroupFinder finder(rows);
  std::vector<Statistics> groups;
  std::vector<int64_t> group_of(rows, kNone);
  Statistics batch;
  const auto length = [&](int64_t row) {
    return lengths && lengths[row] > 0 ? static_cast<double>(lengths[row]) : 0.0;
  };
  const auto weight = [&](int64_t row) { return settings.baseline == Baseline::length_weighted ? length(row) : 1.0; };

  int64_t non_finite = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const double reward = rewards[row];
    const int64_t group = finder.find(ids[row]);
    if (group == static_cast<int64_t>(groups.size())) groups.emplace_back();
    if (!std::isfinite(reward) || (given && !std::isfinite(static_cast<double>(given[row])))) {
      ++non_finite;
      continue;
    }
    group_of[row] = group;
    groups[group].add(reward, weight(row));
    batch.add(reward, 1);
  }

  // The distance from the baseline; exactly zero for equal rewards, whose computed mean may be off by a rounding.
  std::vector<double> centred(rows, 0.0);
  const double batch_mean = batch.mean();
  Statistics tokens;
  for (int64_t row = 0; row < rows; ++row) {
    if (group_of[row] == kNone) continue;
    Statistics& group = groups[group_of[row]];
    const double reward = rewards[row], mean = group.mean();
    group.squares += (reward - mean) * (reward - mean);
    batch.squares += (reward - batch_mean) * (reward - batch_mean);
    if (settings.baseline == Baseline::none) {
      centred[row] = reward;
    } else if (settings.baseline == Baseline::given) {
      centred[row] = reward - static_cast<double>(given[row]);
    } else if (group.count == 1) {
      centred[row] = settings.singleton_self ? reward : 0;
    } else if (!group.equal() && group.weight > 0) {
      const double n = static_cast<double>(group.count);
      centred[row] = (reward - mean) * (settings.baseline == Baseline::leave_one_out ? n / (n - 1) : 1);
    }
    if (settings.scale == Scale::token_whiten && length(row) > 0) tokens.add(centred[row], length(row));
  }

  double token_mean = 0;
  if (settings.scale == Scale::token_whiten) {
    token_mean = tokens.mean();
    for (int64_t row = 0; row < rows; ++row) {
      const double distance = centred[row] - token_mean;
      if (group_of[row] != kNone) tokens.squares += length(row) * distance * distance;
    }
  }

  for (int64_t row = 0; row < rows; ++row) {
    double advantage = 0;
    if (group_of[row] != kNone) {
      const Statistics& group = groups[group_of[row]];
      const bool no_signal = grouped && (group.count == 1 ? !settings.singleton_self : group.equal());
      const bool no_token = settings.scale == Scale::token_whiten && (length(row) == 0 || tokens.equal());
      if (!no_signal && !no_token) {
        advantage = (centred[row] - token_mean) / divisor(settings, group, batch, tokens);
      }
    }
    advantages[row] = static_cast<T>(advantage);
  }

  counts[0] = non_finite;
  counts[1] = finder.groups();
  for (const Statistics& group : groups) {
    counts[2] += group.count > 1 && group.equal();
    counts[3] += group.count == 1;
  }
}

std::tuple<Tensor, Tensor> group_advantages(Tensor rewards, Tensor group_ids, std::optional<Tensor> lengths,
                                            std::optional<Tensor> baseline_rewards, int64_t baseline, int64_t scale,
                                            double eps, int64_t ddof, bool singleton_self) {
  check_advantages(rewards, group_ids, lengths, baseline_rewards, baseline, scale, check_cpu);
  const int64_t rows = rewards.size(0);
  const ScalarType type = rewards.scalar_type();
  const Settings settings{static_cast<Baseline>(baseline), static_cast<Scale>(scale), eps, static_cast<int>(ddof),
                          singleton_self};
  Tensor advantages = torch::stable::new_empty(rewards, {rows});
  Tensor counts = torch::stable::new_zeros(group_ids, {4});
  const int64_t* length_data = lengths ? input<int64_t>(*lengths) : nullptr;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    compute<T>(input<T>(rewards), input<int64_t>(group_ids), length_data,
               baseline_rewards ? input<T>(*baseline_rewards) : nullptr, rows, settings, output<T>(advantages),
               output<int64_t>(counts));
  };
  if (type == ScalarType::Double) {
    run(0.0);
  } else {
    run(0.0f);
  }
  return {advantages, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages)); }

}  // namespace pykern
