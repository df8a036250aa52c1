// The optimal token baseline on the CPU: a task per group, sums in double over its rows in their order.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "policy/token_baseline_arguments.h"

namespace pykern {
namespace {

template <class T>
struct Batch {
  const T *returns, *logprobs, *sum_p2, *weights;
  const uint8_t* mask;
  T* advantages;
  int64_t columns;
  bool by_token, zero_tail, singleton_self;
  double eps;
};

// Of one step of a group, over the responses that have it.
struct Step {
  double weighted = 0, weight = 0;
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
};

struct Longest {
  int64_t row = -1, length = 0, second = 0, members = 0;

  void add(int64_t candidate, int64_t candidate_length) {
    ++members;
    if (candidate_length > length) {
      second = length;
      length = candidate_length;
      row = candidate;
    } else {
      second = std::max(second, candidate_length);
    }
  }
};

// Visits the unmasked tokens of a row: `visit(token, step)`. Returns their number.
template <class T, class Visit>
int64_t for_tokens(const Batch<T>& batch, int64_t row, Visit visit) {
  int64_t count = 0;
  for (int64_t column = 0; column < batch.columns; ++column) {
    const int64_t token = row * batch.columns + column;
    if (batch.mask && !batch.mask[token]) continue;
    visit(token, batch.by_token ? count : column);
    ++count;
  }
  return count;
}

// Returns the rows that were left out for a value that is not finite.
template <class T>
int64_t run_group(const Batch<T>& batch, const int64_t* rows, int64_t count) {
  std::vector<Step> steps(batch.columns);
  std::vector<double> energy(batch.columns);
  std::vector<char> takes_part(count);
  Longest longest;
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0, check = 0;
    const int64_t length = for_tokens(batch, rows[i], [&](int64_t token, int64_t step) {
      const double probability = std::exp(batch.logprobs[token]);
      double share = 1 - 2 * probability + static_cast<double>(batch.sum_p2[token]);
      if (batch.weights) share *= static_cast<double>(batch.weights[token]) * static_cast<double>(batch.weights[token]);
      sum += share;
      energy[step] = sum;
      check += static_cast<double>(batch.returns[token]) * 0;
    });
    takes_part[i] = sum - sum + check == 0;
    if (!takes_part[i] || length == 0) continue;
    longest.add(rows[i], length);
    for_tokens(batch, rows[i], [&](int64_t token, int64_t step) {
      const double value = static_cast<double>(batch.returns[token]);
      steps[step].weighted += energy[step] * value;
      steps[step].weight += energy[step];
      steps[step].low = std::min(steps[step].low, value);
      steps[step].high = std::max(steps[step].high, value);
    });
  }

  const bool alone = longest.members == 1;
  for (int64_t i = 0; i < count; ++i) {
    T* advantages = batch.advantages + rows[i] * batch.columns;
    std::fill(advantages, advantages + batch.columns, T(0));
    if (!takes_part[i] || (alone && !batch.singleton_self)) continue;
    const bool has_tail = batch.zero_tail && rows[i] == longest.row && longest.length > longest.second;
    for_tokens(batch, rows[i], [&](int64_t token, int64_t step) {
      const double value = static_cast<double>(batch.returns[token]);
      if (alone || (has_tail && step >= longest.second)) {
        batch.advantages[token] = static_cast<T>(value);
      } else if (steps[step].low < steps[step].high) {
        batch.advantages[token] =
            static_cast<T>(value - steps[step].weighted / (steps[step].weight + batch.eps));
      }
    });
  }
  return std::count(takes_part.begin(), takes_part.end(), 0);
}

// The rows of each group side by side, in their order; the first place of each group, and one past the last.
struct Groups {
  explicit Groups(const int64_t* ids, int64_t rows) : order(rows) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    for (int64_t place = 0; place < rows; ++place) {
      if (place == 0 || ids[order[place]] != ids[order[place - 1]]) first.push_back(place);
    }
    first.push_back(rows);
  }

  std::vector<int64_t> order, first;
};

std::tuple<Tensor, Tensor> optimal_token_baseline(Tensor returns, Tensor logprobs, Tensor sum_p2, Tensor group_ids,
                                                  std::optional<Tensor> mask, std::optional<Tensor> weights,
                                                  bool by_token, bool zero_tail, double eps, bool singleton_self) {
  check_token_baseline(returns, logprobs, sum_p2, group_ids, mask, weights, check_cpu);
  Tensor advantages = torch::stable::empty_like(returns);
  Tensor counts = torch::stable::new_zeros(group_ids, {1});
  const Groups groups(input<int64_t>(group_ids), returns.size(0));
  const int64_t tasks = static_cast<int64_t>(groups.first.size()) - 1;
  std::vector<int64_t> left_out(tasks);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Batch<T> batch{input<T>(returns),
                         input<T>(logprobs),
                         input<T>(sum_p2),
                         weights ? input<T>(*weights) : nullptr,
                         mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                         output<T>(advantages),
                         returns.size(1),
                         by_token,
                         zero_tail,
                         singleton_self,
                         eps};
    parallel_tasks(tasks, [&](int64_t task, int) {
      const int64_t first = groups.first[task];
      left_out[task] = run_group(batch, groups.order.data() + first, groups.first[task + 1] - first);
    });
  };
  if (returns.scalar_type() == ScalarType::Double) {
    run(0.0);
  } else {
    run(0.0f);
  }
  output<int64_t>(counts)[0] = std::accumulate(left_out.begin(), left_out.end(), int64_t{0});
  return {advantages, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("optimal_token_baseline", TORCH_BOX(&optimal_token_baseline));
}

}  // namespace pykern
