// Statistics of the groups of a block, in the columns of its table. Sums run in fixed point, so they are the same in
// any order.
#pragma once

#include <cmath>

#include "kernels/policy/advantages_values.cuh"
#include "kernels/policy/group_table.cuh"

namespace pykern {

// Columns of the table.
enum GroupColumn : int {
  kResult = GroupTable::kSlots,  // of a row, over its components
  kHasSignal,                    // of a row
  kValue = GroupTable::kOwn,     // of a row; kAbsent if it takes no part
  kCount,                        // from here on, of the group
  kLow,                          // ordered(value)
  kHigh,
  kSumHigh,
  kSumLow,
  kMean,
  kDeviation,
  kFirst,  // row
  kWeight,
  kTokensLow,  // ordered(value), of rows with tokens
  kTokensHigh,
  kTokenMean,
  kTokenDeviation,
  kLargest,  // distance from a given baseline, as the bits of a double that is not negative
  kSpare,
  kSpareMean,
  kGroupColumns,
  // Of a transform.
  kHolders = kTokenDeviation,  // rows with the highest value, or correct rows
  kLongest = kTokenDeviation,
  kSecond = kLargest,  // ordered(value), or what a correct row gets
  kOfWrong = kSpare,
  // Of the deviation of the others: how many hold the lowest value, and beyond the 32nd bit the highest; then for
  // either extreme row the nearest value of another, then the sum of the squares of the others' distances.
  kExtremes = kTokenDeviation,
  kOthers = kLargest,
  kOthersMean = kSpareMean
};
static_assert(kGroupColumns * 8 == kAdvantageRowBytes, "");

// Of a group: all rows; rows weighed by their length; all but the only row with the lowest value, or the highest.
enum GroupPopulation : int { kAll, kTokens, kWithoutLowest, kWithoutHighest, kGroupPopulations };

// Terms of a sum whose magnitudes add up to at most `largest` times `count`.
struct SumBound {
  double largest, count;
};

__device__ __forceinline__ double larger_magnitude(double low, double high) {
  return fabs(low) > fabs(high) ? fabs(low) : fabs(high);
}
__device__ __forceinline__ double square(double value) { return value * value; }

template <class T>
class GroupStatisticsTable : protected BlockGroups {
 protected:
  __device__ __forceinline__ GroupStatisticsTable(const AdvantageParams& params, unsigned char* memory,
                                                  BlockGroupsShared& shared)
      : BlockGroups(params.ids, params.rows, kGroupColumns, memory, kSharedGroupRows, params.tables, shared),
        p_(params),
        rewards_(params) {}

  __device__ __forceinline__ double& number(GroupColumn column, int64_t place) const {
    return table_.numbers(column)[place];
  }
  __device__ __forceinline__ Word& word(GroupColumn column, int64_t place) const {
    return table_.words(column)[place];
  }
  __device__ __forceinline__ double count(int64_t leader) const { return static_cast<double>(word(kCount, leader)); }
  __device__ __forceinline__ double low(int64_t leader) const { return from_ordered(word(kLow, leader)); }
  __device__ __forceinline__ double high(int64_t leader) const { return from_ordered(word(kHigh, leader)); }
  __device__ __forceinline__ double weight(int64_t leader) const { return static_cast<double>(word(kWeight, leader)); }
  __device__ __forceinline__ double tokens_low(int64_t leader) const { return from_ordered(word(kTokensLow, leader)); }
  __device__ __forceinline__ double tokens_high(int64_t leader) const {
    return from_ordered(word(kTokensHigh, leader));
  }
  __device__ __forceinline__ bool takes_part(int64_t place) const { return is_finite(number(kValue, place)); }
  __device__ __forceinline__ int64_t length_at(int64_t place) const { return rewards_.length(table_.row(place)); }

  // Visits the rows that take part, a warp at a time: `visit(part, place, leader)`.
  template <class Visit>
  __device__ __forceinline__ void for_parts(Visit visit) {
    for_rows([&](bool here, int64_t place) {
      const bool part = here && takes_part(place);
      visit(part, place, part ? table_.leader(place) : 0);
    });
  }
  // Visits the groups that have rows which take part, each by one thread.
  template <class Visit>
  __device__ __forceinline__ void for_groups(Visit visit) {
    for_places([&](int64_t place) {
      if (table_.leader(place) == place && word(kCount, place) > 0) visit(place);
    });
  }

  __device__ __forceinline__ void find_groups(int& groups) {
    for_places([&](int64_t place) {
      word(kSumHigh, place) = word(kSumLow, place) = 0;
      clear_slots(place);
    });
    __syncthreads();
    for_places([&](int64_t place) {
      const int64_t leader = leader_of_id(place);
      table_.leader(place) = leader;
      groups += leader == place;
    });
    __syncthreads();
    for_places([&](int64_t place) { word(kHasSignal, place) = 0, number(kResult, place) = 0; });
  }

  // Counts and ranges of the values.
  __device__ __forceinline__ void collect() {
    __syncthreads();
    for_places([&](int64_t place) {
      word(kCount, place) = word(kHigh, place) = word(kWeight, place) = word(kTokensHigh, place) = 0;
      word(kLow, place) = word(kFirst, place) = word(kTokensLow, place) = ~Word{0};
    });
    __syncthreads();
    for_parts([&](bool part, int64_t place, int64_t leader) {
      const Word value = part ? ordered(number(kValue, place)) : 0;
      add_to_leaders(part, leader, 1, table_.words(kCount));
      lower_leaders(part, leader, value, table_.words(kLow));
      raise_leaders(part, leader, value, table_.words(kHigh));
      lower_leaders(part, leader, part ? static_cast<Word>(table_.row(place)) : 0, table_.words(kFirst));
      if (!p_.by_length) return;
      const Word length = part ? static_cast<Word>(length_at(place)) : 0;
      add_to_leaders(length > 0, leader, length, table_.words(kWeight));
      lower_leaders(length > 0, leader, value, table_.words(kTokensLow));
      raise_leaders(length > 0, leader, value, table_.words(kTokensHigh));
    });
    __syncthreads();
  }

  // Sums `term(place, leader)` over each group, to `finish(leader, sum)`.
  template <class Bound, class Term, class Finish>
  __device__ __forceinline__ void sum_groups(Bound bound, Term term, Finish finish) {
    for_parts([&](bool part, int64_t place, int64_t leader) {
      Word high = 0, low = 0;
      if (part) {
        const SumBound most = bound(leader);
        part = most.largest > 0 && is_finite(most.largest) && most.count > 0;
        if (part) FixedPoint(most.largest, most.count).cut(term(place, leader), high, low);
      }
      add_to_leaders(part, leader, high, table_.words(kSumHigh));
      add_to_leaders(part, leader, low, table_.words(kSumLow));
    });
    __syncthreads();
    for_groups([&](int64_t leader) {
      const SumBound most = bound(leader);
      Word &high = word(kSumHigh, leader), &low = word(kSumLow, leader);
      finish(leader, !(most.largest > 0 && most.count > 0) ? 0
                     : !is_finite(most.largest)          ? HUGE_VAL
                                                         : FixedPoint(most.largest, most.count).join(high, low));
      high = low = 0;
    });
    __syncthreads();
  }

  // --- means and squares of the distances from them, of each GroupPopulation ----------------------------------------

  // Of a group's rows, whether one alone holds the lowest value, or the highest.
  __device__ __forceinline__ bool only_holder(int64_t leader, int side) const {
    return (side ? word(kExtremes, leader) >> 32 : word(kExtremes, leader) & 0xffffffffu) == 1;
  }
  __device__ __forceinline__ double lowest(int population, int64_t leader) const {
    return from_ordered(population == kTokens          ? word(kTokensLow, leader)
                        : population == kWithoutLowest ? word(kOthers, leader)
                                                       : word(kLow, leader));
  }
  __device__ __forceinline__ double highest(int population, int64_t leader) const {
    return from_ordered(population == kTokens           ? word(kTokensHigh, leader)
                        : population == kWithoutHighest ? table_.words(kOthers + 1)[leader]
                                                        : word(kHigh, leader));
  }
  // The sum of the rows' weights; zero for no statistics.
  __device__ __forceinline__ double total(int population, int64_t leader) const {
    if (population == kTokens) return weight(leader);
    const double n = count(leader);
    if (population == kAll) return n;
    return n > 2 && only_holder(leader, population - kWithoutLowest) ? n - 1 : 0;
  }
  __device__ __forceinline__ double row_weight(int population, int64_t place, int64_t leader) const {
    if (population == kTokens) return static_cast<double>(length_at(place));
    if (population == kAll) return 1;
    return ordered(number(kValue, place)) != word(population == kWithoutLowest ? kLow : kHigh, leader);
  }
  __device__ __forceinline__ GroupColumn mean_column(int population) const {
    return population == kAll ? kMean : population == kTokens ? kTokenMean : kOthersMean;
  }

  // Sums over each group its rows' weights times the values, or the squares of their distances from the mean.
  __device__ __forceinline__ void find_mean(int population) {
    const auto bound = [&](int64_t leader) {
      return SumBound{larger_magnitude(lowest(population, leader), highest(population, leader)),
                      total(population, leader)};
    };
    sum_groups(
        bound,
        [&](int64_t place, int64_t leader) { return row_weight(population, place, leader) * number(kValue, place); },
        [&](int64_t leader, double sum) {
          number(mean_column(population), leader) =
              mean_within(sum, total(population, leader), lowest(population, leader), highest(population, leader));
        });
  }
  __device__ __forceinline__ void find_deviation(int population) {
    const auto bound = [&](int64_t leader) {
      return SumBound{square(highest(population, leader) - lowest(population, leader)), total(population, leader)};
    };
    sum_groups(
        bound,
        [&](int64_t place, int64_t leader) {
          const double distance = number(kValue, place) - number(mean_column(population), leader);
          return row_weight(population, place, leader) * square(distance);
        },
        [&](int64_t leader, double sum) {
          const double n = count(leader);
          if (population == kTokens) {
            number(kTokenDeviation, leader) = sqrt(sum / weight(leader));
          } else if (population != kAll) {
            // Others that are equal have no deviation to divide by.
            const bool equal = lowest(population, leader) == highest(population, leader);
            table_.words(kOthers + population - kWithoutLowest)[leader] =
                static_cast<Word>(__double_as_longlong(equal ? -1 : sum));
          } else if (p_.scale == Scale::leave_one_out_std) {
            number(kDeviation, leader) = sum;
          } else {
            number(kDeviation, leader) = n > 1 ? sqrt(sum / (n - p_.ddof)) : 1;
          }
        });
  }

  // Of the others than a row. Taking its share from the sum of squares of all is exact enough, unless the row is the
  // only one with the lowest or the highest value, which may hold most of the sum: those two sums are made apart, and
  // this finds what the two are made of.
  __device__ __forceinline__ void find_extremes() {
    for_groups([&](int64_t leader) {
      word(kExtremes, leader) = 0;
      word(kOthers, leader) = ~Word{0};
      table_.words(kOthers + 1)[leader] = 0;
    });
    __syncthreads();
    for_parts([&](bool part, int64_t place, int64_t leader) {
      const Word value = part ? ordered(number(kValue, place)) : 0;
      const bool lowest = part && value == word(kLow, leader), highest = part && value == word(kHigh, leader);
      add_to_leaders(lowest || highest, leader, Word{lowest} + (Word{highest} << 32), table_.words(kExtremes));
      lower_leaders(part && !lowest, leader, value, table_.words(kOthers));
      raise_leaders(part && !highest, leader, value, table_.words(kOthers + 1));
    });
    __syncthreads();
  }
  // What a row is divided by for the deviation of the others, or -1 where they are equal.
  __device__ __forceinline__ double deviation_of_others(int64_t place, int64_t leader) const {
    const double n = count(leader), value = number(kValue, place);
    double squares;
    if (n == 2 || low(leader) == high(leader)) return -1;
    const bool is_lowest = value == low(leader), is_highest = value == high(leader);
    if ((is_lowest && only_holder(leader, 0)) || (is_highest && only_holder(leader, 1))) {
      squares = __longlong_as_double(static_cast<long long>(table_.words(kOthers + is_highest)[leader]));
      if (squares < 0) return -1;
    } else {
      squares = number(kDeviation, leader) - square(value - number(kMean, leader)) * n / (n - 1);
    }
    return sqrt(squares / (n - 2));
  }

  const AdvantageParams& p_;
  const RowRewards<T> rewards_;
};

}  // namespace pykern
