// Mean and standard deviation of each row's group. Sums run in double over the rows of a group in their order, so a
// result depends on no thread.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "policy/advantages_statistics.h"
#include "policy/group_finder.h"
#include "policy/statistics_arguments.h"

namespace pykern {
namespace {

struct Workspace {
  SortedGroups sorted;
  std::vector<double> values;  // by place
};

template <class T>
struct StatisticsOutputs {
  T *mean, *deviation;
  int64_t* count;
};

template <class T>
void find_statistics(const T* value_of, const int64_t* ids, int64_t rows, int ddof, const StatisticsOutputs<T>& out,
                     Workspace& workspace) {
  SortedGroups& sorted = workspace.sorted;
  double* const values = at_least(workspace.values, rows);
  // Rows that are not finite stay in their group too: they get its statistics.
  sorted.sort(
      ids, rows, [](int64_t) { return true; }, [&](int64_t row, int32_t place) { values[place] = value_of[row]; });
  for (int32_t group = 0; group < sorted.groups(); ++group) {
    const int32_t begin = sorted.begin(group), end = sorted.end(group);
    const Moments moments([&](auto visit) {
      for (int32_t place = begin; place < end; ++place) visit(values[place], std::isfinite(values[place]) ? 1.0 : 0.0);
    });
    constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
    const double mean = moments.empty() ? kNone : moments.mean;
    const double deviation = moments.empty() ? kNone : moments.equal() ? 0 : moments.deviation(ddof);
    for (int32_t place = begin; place < end; ++place) {
      const int32_t row = sorted.rows()[place];
      out.mean[row] = static_cast<T>(mean);
      out.deviation[row] = static_cast<T>(deviation);
      out.count[row] = static_cast<int64_t>(moments.weight);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> group_statistics(Tensor values, Tensor group_ids, int64_t ddof) {
  check_group_statistics(values, group_ids, ddof, check_cpu);
  const int64_t rows = values.size(0);
  Tensor mean = torch::stable::new_empty(values, {rows});
  Tensor deviation = torch::stable::new_empty(values, {rows});
  Tensor count = torch::stable::new_empty(group_ids, {rows});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const StatisticsOutputs<T> out{output<T>(mean), output<T>(deviation), output<int64_t>(count)};
    with_workspace<Workspace>(rows, [&](Workspace& workspace) {
      find_statistics(input<T>(values), input<int64_t>(group_ids), rows, static_cast<int>(ddof), out, workspace);
    });
  };
  if (values.scalar_type() == ScalarType::Double) {
    run(0.0);
  } else {
    run(0.0f);
  }
  return {mean, deviation, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("group_statistics", TORCH_BOX(&group_statistics)); }

}  // namespace pykern
