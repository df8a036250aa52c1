// Advantages of one reward per row, by the mean of its group or the others in it and their deviation, in one launch.
// Sums run in fixed point, so they are the same in any order.
#pragma once

#include <cmath>

#include "kernels/policy/advantages.h"
#include "kernels/policy/group_table.cuh"

namespace pykern {

constexpr int kAdvantageCounts = static_cast<int>(AdvantageCount::count);

struct CountsShared {
  Word counts[kAdvantageCounts];
};

__device__ __forceinline__ void clear_counts(CountsShared& shared) {
  if (threadIdx.x < kAdvantageCounts) shared.counts[threadIdx.x] = 0;
}

// Adds what each thread of the block has counted, in the order of AdvantageCount. All threads must call.
__device__ __forceinline__ void add_counts(const int (&counted)[kAdvantageCounts], CountsShared& shared, Word* counts) {
#pragma unroll
  for (int index = 0; index < kAdvantageCounts; ++index) {
    const int sum = __reduce_add_sync(kFullWarp, counted[index]);
    if (threadIdx.x % kWarpSize == 0 && sum > 0) atomicAdd(&shared.counts[index], static_cast<Word>(sum));
  }
  __syncthreads();
  if (threadIdx.x < kAdvantageCounts && shared.counts[threadIdx.x] > 0) {
    atomicAdd(&counts[threadIdx.x], shared.counts[threadIdx.x]);
  }
}

struct GroupStatistics {
  double count, low, high, mean, variance;

  __device__ __forceinline__ bool equal() const { return low == high; }
};

struct PlainShared {
  BlockGroupsShared groups;
  CountsShared counts;
};

template <class T>
class PlainAdvantages : BlockGroups {
 public:
  __device__ __forceinline__ PlainAdvantages(const AdvantageParams& params, unsigned char* memory, PlainShared& shared)
      : BlockGroups(params.ids, params.rows, kColumns, memory, kSharedGroupRows, params.tables, shared.groups),
        p_(params),
        rewards_(static_cast<const T*>(params.rewards)),
        given_(static_cast<const T*>(params.baseline_rewards)),
        shared_(shared) {}

  __device__ __forceinline__ void run() {
    clear_counts(shared_.counts);
    take_rows();
    find_groups();
    if (needs_mean()) add_up();
    write_rows();
  }

 private:
  enum Column : int {
    kCount = GroupTable::kOwn,
    kLow,  // ordered(reward)
    kHigh,
    kSumHigh,
    kSumLow,
    kColumns,
    kSquaresHigh = GroupTable::kSlots,
    kSquaresLow
  };
  static_assert(kColumns * 8 == kPlainRowBytes, "");

  __device__ __forceinline__ double reward(int64_t row) const {
    return p_.weights[0] * static_cast<double>(rewards_[row]);
  }
  __device__ __forceinline__ bool takes_part(int64_t row) const {
    return is_finite(reward(row)) && (!given_ || is_finite(static_cast<double>(given_[row])));
  }
  __device__ __forceinline__ bool needs_mean() const { return p_.grouped || p_.filter == Filter::difficulty; }

  __device__ __forceinline__ void find_groups() {
    for_places([&](int64_t place) {
      table_.words(kCount)[place] = table_.words(kSumHigh)[place] = table_.words(kSumLow)[place] = 0;
      table_.words(kLow)[place] = ~Word{0};
      table_.words(kHigh)[place] = 0;
      clear_slots(place);
    });
    __syncthreads();
    int counted[kAdvantageCounts] = {};
    for_rows([&](bool here, int64_t place) {
      int64_t leader = 0, row = 0;
      if (here) {
        row = table_.row(place);
        leader = leader_of_id(place);
        table_.leader(place) = leader;
        counted[static_cast<int>(AdvantageCount::groups)] += leader == place;
      }
      const bool part = here && takes_part(row);
      counted[static_cast<int>(AdvantageCount::non_finite)] += here && !part;
      const Word word = part ? ordered(reward(row)) : 0;
      add_to_leaders(part, leader, 1, table_.words(kCount));
      lower_leaders(part, leader, word, table_.words(kLow));
      raise_leaders(part, leader, word, table_.words(kHigh));
    });
    __syncthreads();
    for_places([&](int64_t place) {
      if (table_.leader(place) == place) {
        const GroupStatistics group = range_of(place);
        const bool equal = group.count > 1 && group.equal();
        counted[static_cast<int>(AdvantageCount::equal_groups)] += equal;
        counted[static_cast<int>(AdvantageCount::singletons)] += group.count == 1;
        if (equal && p_.filter == Filter::equal) {
          counted[static_cast<int>(AdvantageCount::filtered)] += static_cast<int>(group.count);
        }
      }
      table_.words(kSquaresHigh)[place] = table_.words(kSquaresLow)[place] = 0;
    });
    add_counts(counted, shared_.counts, p_.counts);
    __syncthreads();
  }

  __device__ __forceinline__ GroupStatistics range_of(int64_t leader) const {
    return {static_cast<double>(table_.words(kCount)[leader]), from_ordered(table_.words(kLow)[leader]),
            from_ordered(table_.words(kHigh)[leader]), 0, 0};
  }

  __device__ __forceinline__ FixedPoint unit_of_sum(const GroupStatistics& group) const {
    const double low = fabs(group.low), high = fabs(group.high);
    return {low > high ? low : high, group.count};
  }

  __device__ __forceinline__ GroupStatistics with_mean(int64_t leader) const {
    GroupStatistics group = range_of(leader);
    const double sum = unit_of_sum(group).join(table_.words(kSumHigh)[leader], table_.words(kSumLow)[leader]);
    group.mean = mean_within(sum, group.count, group.low, group.high);
    return group;
  }

  // The square of a group's range, which bounds the squares of the distances from its mean.
  static __device__ __forceinline__ double largest_square(const GroupStatistics& group) {
    return (group.high - group.low) * (group.high - group.low);
  }

  __device__ __forceinline__ GroupStatistics with_variance(int64_t leader) const {
    GroupStatistics group = with_mean(leader);
    const double largest = largest_square(group);
    const Word high = table_.words(kSquaresHigh)[leader], low = table_.words(kSquaresLow)[leader];
    const double squares = is_finite(largest) ? FixedPoint(largest, group.count).join(high, low) : HUGE_VAL;
    group.variance = group.count > p_.ddof ? squares / (group.count - p_.ddof) : 0;
    return group;
  }

  __device__ __forceinline__ void add_up() {
    for_rows([&](bool here, int64_t place) {
      const int64_t row = here ? table_.row(place) : 0, leader = here ? table_.leader(place) : 0;
      const bool part = here && takes_part(row);
      Word high = 0, low = 0;
      if (part) unit_of_sum(range_of(leader)).cut(reward(row), high, low);
      add_to_leaders(part, leader, high, table_.words(kSumHigh));
      add_to_leaders(part, leader, low, table_.words(kSumLow));
    });
    __syncthreads();
    if (p_.scale != Scale::group_std) return;
    for_rows([&](bool here, int64_t place) {
      const int64_t row = here ? table_.row(place) : 0, leader = here ? table_.leader(place) : 0;
      Word high = 0, low = 0;
      bool part = here && takes_part(row);
      if (part) {
        const GroupStatistics group = with_mean(leader);
        const double largest = largest_square(group), distance = reward(row) - group.mean;
        part = largest > 0 && is_finite(largest);
        if (part) FixedPoint(largest, group.count).cut(distance * distance, high, low);
      }
      add_to_leaders(part, leader, high, table_.words(kSquaresHigh));
      add_to_leaders(part, leader, low, table_.words(kSquaresLow));
    });
    __syncthreads();
  }

  __device__ __forceinline__ bool passes_filter(const GroupStatistics& group) const {
    if (p_.filter == Filter::equal) return !(group.count > 1 && group.equal());
    if (p_.filter == Filter::difficulty) return p_.window_low < group.mean && group.mean < p_.window_high;
    return true;
  }

  __device__ __forceinline__ double distance(int64_t row, const GroupStatistics& group) const {
    const double value = reward(row);
    if (p_.baseline == Baseline::given) return value - static_cast<double>(given_[row]);
    if (p_.baseline == Baseline::none || group.count == 1) return value;
    return (value - group.mean) * (p_.baseline == Baseline::leave_one_out ? group.count / (group.count - 1) : 1);
  }

  __device__ __forceinline__ void write_rows() {
    T* const advantages = static_cast<T*>(p_.advantages);
    Word filtered = 0;
    for_places([&](int64_t place) {
      const int64_t row = table_.row(place), leader = table_.leader(place);
      double advantage = 0;
      bool keep = false;
      if (takes_part(row)) {
        const GroupStatistics group = !needs_mean()                    ? range_of(leader)
                                      : p_.scale == Scale::group_std ? with_variance(leader)
                                                                     : with_mean(leader);
        keep = passes_filter(group);
        filtered += !keep && p_.filter == Filter::difficulty;
        // Exactly zero for equal rewards, whose computed mean may be off by a rounding.
        const bool signal = keep && !(p_.grouped && (group.count == 1 ? !p_.singleton_self : group.equal()));
        const double deviation = group.count > 1 ? sqrt(group.variance) : 1;
        const double divisor = p_.scale == Scale::group_std ? deviation + p_.eps : 1;
        if (signal) advantage = distance(row, group) / divisor;
      }
      advantages[row] = static_cast<T>(advantage);
      p_.keep[row] = keep;
    });
    if (filtered > 0) atomicAdd(&p_.counts[static_cast<int>(AdvantageCount::filtered)], filtered);
  }

  const AdvantageParams& p_;
  const T* rewards_;
  const T* given_;
  PlainShared& shared_;
};

constexpr int kAdvantageThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kAdvantageThreads)
    plain_advantages_kernel(const __grid_constant__ AdvantageParams params) {
  PYKERN_DYNAMIC_SHARED(memory);
  PYKERN_SHARED(PlainShared, shared);
  PlainAdvantages<T>(params, memory, shared).run();
}

}  // namespace pykern
