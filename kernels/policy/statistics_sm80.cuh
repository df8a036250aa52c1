// Mean and standard deviation of each row's group, in one launch.
#pragma once

#include <cmath>

#include "kernels/policy/group_statistics.cuh"
#include "kernels/policy/statistics.h"

namespace pykern {

template <class T>
class RowStatistics : GroupStatisticsTable<T> {
  using Table = GroupStatisticsTable<T>;

 public:
  __device__ __forceinline__ RowStatistics(const StatisticsParams& params, unsigned char* memory,
                                           BlockGroupsShared& shared)
      : Table(params.groups, memory, shared), out_(params) {}

  __device__ __forceinline__ void run() {
    Table::take_rows();
    int groups = 0;
    Table::find_groups(groups);
    const T* const values = static_cast<const T*>(out_.groups.rewards);
    Table::for_places([&](int64_t place) {
      const double value = static_cast<double>(values[Table::table_.row(place)]);
      Table::number(kValue, place) = is_finite(value) ? value : kAbsent;
    });
    Table::collect();
    Table::find_mean(kAll);
    Table::find_deviation(kAll);
    write_rows();
  }

 private:
  __device__ __forceinline__ void write_rows() {
    T* const means = static_cast<T*>(out_.mean);
    T* const deviations = static_cast<T*>(out_.deviation);
    Table::for_places([&](int64_t place) {
      const int64_t row = Table::table_.row(place), leader = Table::table_.leader(place);
      const double count = Table::count(leader);
      double mean = NAN, deviation = NAN;
      if (count > 0) {
        mean = Table::number(kMean, leader);
        deviation = Table::low(leader) == Table::high(leader) ? 0 : Table::number(kDeviation, leader);
      }
      means[row] = static_cast<T>(mean);
      deviations[row] = static_cast<T>(deviation);
      out_.count[row] = static_cast<int64_t>(count);
    });
  }

  const StatisticsParams& out_;
};

constexpr int kStatisticsThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kStatisticsThreads)
    group_statistics_kernel(const __grid_constant__ StatisticsParams params) {
  PYKERN_DYNAMIC_SHARED(memory);
  PYKERN_SHARED(BlockGroupsShared, shared);
  RowStatistics<T>(params, memory, shared).run();
}

}  // namespace pykern
