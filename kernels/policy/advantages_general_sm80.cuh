// Advantages by any parts, in one launch: what the rows of a group decide, the block that owns the group finds; what
// all rows decide, the last block (advantages_batch.cuh). With a filter that others' statistics depend on there is a
// launch before it, which finds the rows that it keeps.
#pragma once

#include <cmath>

#include "kernels/policy/advantages_batch.cuh"
#include "kernels/policy/advantages_sm80.cuh"
#include "kernels/policy/group_statistics.cuh"

namespace pykern {

struct GeneralShared {
  BlockGroupsShared groups;
  CountsShared counts;
  BatchShared batch;
};

template <class T>
class GeneralAdvantages : GroupStatisticsTable<T> {
  using Base = GroupStatisticsTable<T>;
  using Base::collect, Base::count, Base::find_deviation, Base::find_groups, Base::find_mean, Base::for_groups;
  using Base::for_parts, Base::for_places, Base::high, Base::length_at, Base::low, Base::number, Base::p_;
  using Base::rewards_, Base::table_, Base::takes_part, Base::weight, Base::word;

 public:
  __device__ __forceinline__ GeneralAdvantages(const AdvantageParams& params, unsigned char* memory,
                                               GeneralShared& shared)
      : Base(params, memory, shared.groups), shared_(shared) {}

  __device__ __forceinline__ void run() {
    clear_counts(shared_.counts);
    this->take_rows();
    int counted[kAdvantageCounts] = {};
    find_groups(counted[static_cast<int>(AdvantageCount::groups)]);
    const int parts = p_.decompose ? p_.components : 1;
    // Each function is called in one place only: inlined, they are large.
#pragma unroll 1
    for (int part = p_.stage == AdvantageStage::after_filter ? 0 : kTotal; part < parts; ++part) {
      // Of one part the values are the sums, which are in the table already.
      const bool at_hand = p_.stage == AdvantageStage::whole && part == 0 && !p_.decompose &&
                           p_.transform != Transform::min_max;
      if (!at_hand) take_part(part);
      const int first = part != kTotal && p_.group_transform ? kRaw : kFinal;
#pragma unroll 1
      for (int turn = first; turn <= kFinal; ++turn) {
        if (!at_hand || turn > first) collect();
        measure(part == kTotal ? kSums : static_cast<Turn>(turn));
        if (turn == kRaw) transform_groups();
      }
      if (part != kTotal) {
        add_part(part);
      } else {
        total_up(counted);
        if (p_.stage == AdvantageStage::filter) return;
      }
    }
    if (!p_.whole_batch) {
      T* const advantages = static_cast<T*>(p_.advantages);
      for_places([&](int64_t place) {
        advantages[table_.row(place)] = static_cast<T>(word(kHasSignal, place) ? number(kResult, place) : 0);
      });
      return;
    }
    WholeBatch<T> batch(p_, rewards_, shared_.batch);
    if (batch.is_last_block()) batch.run();
  }

 private:
  // Of what there are statistics: the sums, for the filter; the rewards, for a transform; what is left by it.
  enum Turn : int { kSums, kRaw, kFinal };

  // --- which rows take part ---------------------------------------------------------------------------------------

  __device__ __forceinline__ void total_up(int (&counted)[kAdvantageCounts]) {
    for_groups([&](int64_t leader) {
      const double n = count(leader);
      counted[static_cast<int>(AdvantageCount::equal_groups)] += n > 1 && low(leader) == high(leader);
      counted[static_cast<int>(AdvantageCount::singletons)] += n == 1;
      if (!passes_filter(leader)) counted[static_cast<int>(AdvantageCount::filtered)] += static_cast<int>(n);
    });
    for_places([&](int64_t place) {
      const int64_t row = table_.row(place);
      const bool part = takes_part(place);
      counted[static_cast<int>(AdvantageCount::non_finite)] += !part;
      if (part) counted[static_cast<int>(AdvantageCount::missing)] += rewards_.missing(row);
      p_.keep[row] = part && passes_filter(table_.leader(place));
    });
    add_counts(counted, shared_.counts, p_.counts);
  }
  __device__ __forceinline__ bool passes_filter(int64_t leader) const {
    if (p_.filter == Filter::equal) return !(count(leader) > 1 && low(leader) == high(leader));
    if (p_.filter == Filter::difficulty) {
      return p_.window_low < number(kMean, leader) && number(kMean, leader) < p_.window_high;
    }
    return true;
  }

  __device__ __forceinline__ void take_part(int part) {
    double low = 0, high = 1;
    const bool to_range = p_.transform == Transform::min_max && part != kTotal;
    if (to_range) {
      low = HUGE_VAL, high = -HUGE_VAL;
      double value[4];
      for_four_rows(
          p_.rows, [&](int turn, int64_t row) { value[turn] = rewards_.part(row, part); },
          [&](int turn, int64_t) {
            if (!is_finite(value[turn])) return;
            low = value[turn] < low ? value[turn] : low;
            high = value[turn] > high ? value[turn] : high;
          });
      low = block_reduce(low, HUGE_VAL, Smallest{}, shared_.batch.values);
      high = block_reduce(high, -HUGE_VAL, Largest{}, shared_.batch.values);
    }
    for_places([&](int64_t place) {
      const double value = rewards_.part(table_.row(place), part);
      number(kValue, place) = !to_range || !is_finite(value) ? value : high > low ? (value - low) / (high - low) : 0;
    });
  }

  // --- transforms by the group; a group of one keeps its reward -----------------------------------------------------

  __device__ __forceinline__ void transform_groups() {
    for_groups([&](int64_t leader) { word(kHolders, leader) = word(kSecond, leader) = 0; });
    __syncthreads();
    const bool by_best = p_.transform == Transform::best_gap, by_longest = p_.transform == Transform::relative_length;
    for_parts([&](bool part, int64_t place, int64_t leader) {
      const double value = part ? number(kValue, place) : 0;
      if (by_longest) {
        raise_leaders(part, leader, part ? static_cast<Word>(length_at(place)) : 0, table_.words(kLongest));
        return;
      }
      const bool holds = part && (by_best ? value == high(leader) : value > 0);
      add_to_leaders(holds, leader, 1, table_.words(kHolders));
      if (by_best) raise_leaders(part && !holds, leader, ordered(value), table_.words(kSecond));
    });
    __syncthreads();
    if (!by_best && !by_longest) {
      for_groups([&](int64_t leader) {
        const auto correct = static_cast<double>(word(kHolders, leader));
#pragma unroll 1
        for (int wrong = 0; wrong < 2; ++wrong) {
          const double gets = pass_reward(p_.transform, count(leader), correct, p_.k, !wrong);
          table_.numbers(kSecond + wrong)[leader] = gets;
        }
      });
      __syncthreads();
    }
    for_parts([&](bool part, int64_t place, int64_t leader) {
      if (!part || word(kCount, leader) == 1) return;
      double& value = number(kValue, place);
      if (by_longest) {
        const Word longest = word(kLongest, leader);
        const double share = static_cast<double>(length_at(place)) / static_cast<double>(longest > 0 ? longest : 1);
        value -= number(kMean, leader) * p_.relative_length * share;
      } else if (by_best) {
        const bool best = value == high(leader) && word(kHolders, leader) == 1;
        value = best ? value - from_ordered(word(kSecond, leader)) : 0;
      } else {
        value = value > 0 ? number(kSecond, leader) : number(kOfWrong, leader);
      }
    });
  }

  // --- statistics ---------------------------------------------------------------------------------------------------

  __device__ __forceinline__ bool may_fall_back() const {
    return p_.scale == Scale::token_std && is_finite(p_.fallback);
  }
  __device__ __forceinline__ bool needs_mean(Turn turn, int population) const {
    switch (turn) {
      case kSums: return population == kAll && p_.filter == Filter::difficulty;
      case kRaw:
        return population == kAll &&
               (p_.transform == Transform::relative_length || p_.transform == Transform::best_gap);
      default:
        return population == kAll || (population == kTokens ? p_.by_length : p_.scale == Scale::leave_one_out_std);
    }
  }
  // Of those whose mean is needed.
  __device__ __forceinline__ bool needs_deviation(Turn turn, int population) const {
    if (turn == kSums) return false;
    if (population == kTokens) return p_.scale == Scale::token_std;
    if (p_.scale == Scale::leave_one_out_std) return turn == kFinal;
    // After best_gap the deviation is still that of the rewards.
    return (p_.scale == Scale::group_std || may_fall_back()) &&
           (turn == kRaw) == (p_.transform == Transform::best_gap);
  }

  __device__ __forceinline__ void measure(Turn turn) {
#pragma unroll 1
    for (int population = 0; population < kGroupPopulations; ++population) {
      if (!needs_mean(turn, population)) continue;
      if (population == kWithoutLowest) this->find_extremes();
      find_mean(population);
      if (needs_deviation(turn, population)) find_deviation(population);
    }
    if (turn == kFinal && may_fall_back() && p_.baseline == Baseline::given) {
      for_groups([&](int64_t leader) { word(kLargest, leader) = 0; });
      __syncthreads();
      for_parts([&](bool part, int64_t place, int64_t leader) {
        const double distance = part ? number(kValue, place) - rewards_.given(table_.row(place)) : 0;
        raise_leaders(part, leader, static_cast<Word>(__double_as_longlong(fabs(distance))), table_.words(kLargest));
      });
      __syncthreads();
    }
  }

  __device__ __forceinline__ bool has_signal(int64_t leader) const {
    if (!p_.grouped) return true;
    if (word(kCount, leader) == 1) return p_.singleton_self;
    if (p_.by_length) return weight(leader) > 0 && this->tokens_low(leader) < this->tokens_high(leader);
    return low(leader) < high(leader);
  }

  // From the baseline, if that is one of the group.
  __device__ __forceinline__ double distance(double value, int64_t leader) const {
    const double n = count(leader);
    if (n == 1) return value;
    switch (p_.baseline) {
      case Baseline::group_mean: return value - number(kMean, leader);
      case Baseline::leave_one_out: return (value - number(kMean, leader)) * (n / (n - 1));
      case Baseline::length_weighted: return value - number(kTokenMean, leader);
      default: return value;
    }
  }

  // The group's scale; an infinite one leaves nothing.
  __device__ __forceinline__ double divisor(int64_t place, int64_t leader) const {
    const bool single = word(kCount, leader) == 1;
    switch (p_.scale) {
      case Scale::group_std: return number(kDeviation, leader) + p_.eps;
      case Scale::leave_one_out_std: {
        if (single) return 1 + p_.eps;
        const double deviation = this->deviation_of_others(place, leader);
        return deviation < 0 ? 1 : deviation + p_.eps;
      }
      case Scale::token_std: return (single ? 1 : number(kTokenDeviation, leader)) + p_.eps;
      case Scale::group_mean: return number(kMean, leader) > 0 ? number(kMean, leader) + p_.eps : HUGE_VAL;
      default: return 1;
    }
  }

  // Whether the group goes by its own deviation, because by its tokens' the largest advantage would be too large.
  __device__ __forceinline__ bool falls_back(int64_t leader, double divisor) const {
    if (!may_fall_back() || word(kCount, leader) == 1) return false;
    const double largest =
        p_.baseline == Baseline::given
            ? __longlong_as_double(static_cast<long long>(word(kLargest, leader)))
            : larger_magnitude(distance(low(leader), leader), distance(high(leader), leader));
    return largest / divisor >= p_.fallback;
  }

  __device__ __forceinline__ void add_part(int part) {
    const bool of_batch = p_.baseline == Baseline::batch_mean || p_.baseline == Baseline::groups_mean;
    for_places([&](int64_t place) {
      const int64_t row = table_.row(place), leader = table_.leader(place), at = part * p_.rows + row;
      if (!takes_part(place)) {
        if (p_.whole_batch) p_.columns.states[at] = 0;
        return;
      }
      const bool signal = has_signal(leader), single = word(kCount, leader) == 1;
      const double value = number(kValue, place);
      double centred = 0, by = 1;
      if (signal) {
        centred = p_.baseline == Baseline::given ? value - rewards_.given(row) : distance(value, leader);
        by = divisor(place, leader);
        if (!of_batch && falls_back(leader, by)) {
          centred = value - number(kMean, leader);
          by = number(kDeviation, leader) + p_.eps;
        }
      }
      if (!p_.whole_batch) {
        if (signal) number(kResult, place) += (p_.decompose ? p_.weights[part] : 1) * (centred / by);
        if (signal) word(kHasSignal, place) = 1;
        return;
      }
      const BatchColumns& columns = p_.columns;
      if (columns.value) columns.value[at] = value;
      if (columns.centred) columns.centred[at] = centred;
      if (columns.divisor) columns.divisor[at] = by;
      if (columns.mean) columns.mean[at] = number(kMean, leader);
      if (columns.deviation) {
        columns.low[at] = low(leader);
        columns.high[at] = high(leader);
        columns.deviation[at] = number(kDeviation, leader) + p_.eps;
      }
      columns.states[at] = static_cast<uint8_t>(
          kTakesPart | (signal ? kSignal : 0) | (word(kFirst, leader) == static_cast<Word>(row) ? kFirstOfGroup : 0) |
          ((single ? p_.singleton_self : low(leader) < high(leader)) ? kValidGroup : 0) | (single ? kSingle : 0));
    });
  }

  GeneralShared& shared_;
};

constexpr int kGeneralThreads = 512;

template <class T>
__global__ void __launch_bounds__(kGeneralThreads, 1)
    general_advantages_kernel(const __grid_constant__ AdvantageParams params) {
  PYKERN_DYNAMIC_SHARED(memory);
  PYKERN_SHARED(GeneralShared, shared);
  GeneralAdvantages<T>(params, memory, shared).run();
}

}  // namespace pykern
