// Advantages of grouped rows in one launch. Every block reads all ids and owns the groups whose id hashes to
// it, so that no block waits for another. Its rows go into a list in no particular order: nothing below
// depends on it. Groups are found with a hash table; their sums are sums of integers (FixedPoint), which
// are the same in any order, and far finer than a double's.
#pragma once

#include <cmath>

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/policy/advantages.h"

namespace pykern {

using Word = unsigned long long;  // what 64-bit atomics take

// --- numbers ------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_finite(double value) { return value - value == 0; }

// Words in the order of the doubles.
__device__ __forceinline__ Word ordered(double value) {
  const Word bits = static_cast<Word>(__double_as_longlong(value));
  return bits >> 63 ? ~bits : bits | Word{1} << 63;
}
__device__ __forceinline__ double from_ordered(Word word) {
  return __longlong_as_double(static_cast<long long>(word >> 63 ? word & ~(Word{1} << 63) : ~word));
}

// Terms of a sum whose magnitudes add up to less than 2^exponent, cut into two integers: the second holds
// 31 bits beyond the first, which has 61 below the exponent.
class FixedPoint {
 public:
  __device__ __forceinline__ FixedPoint(double largest, double count) {
    int of_largest, of_count;
    frexp(largest, &of_largest);
    frexp(count, &of_count);
    exponent_ = of_largest + of_count;
  }
  __device__ __forceinline__ void cut(double term, Word& high, Word& low) const {
    const double scaled = ldexp(term, 61 - exponent_), whole = rint(scaled);
    high = static_cast<Word>(static_cast<long long>(whole));
    low = static_cast<Word>(static_cast<long long>(rint((scaled - whole) * kLowUnits)));
  }
  __device__ __forceinline__ double join(Word high, Word low) const {
    const double sum = static_cast<double>(static_cast<long long>(high)) +
                       static_cast<double>(static_cast<long long>(low)) / kLowUnits;
    return ldexp(sum, exponent_ - 61);
  }

 private:
  static constexpr double kLowUnits = 2147483648.0;
  int exponent_;
};

// --- groups of a block --------------------------------------------------------------------------------------------

// Arrays with an entry per row of the block. One row of each group, its leader, holds the group's sums at
// its own place.
struct GroupTable {
  __device__ __forceinline__ GroupTable(unsigned char* memory, int64_t rows)
      : row(reinterpret_cast<int64_t*>(memory)),
        id(row + rows),
        leader(id + rows),
        count(reinterpret_cast<Word*>(leader + rows)),
        low(count + rows),
        high(low + rows),
        weight(high + rows),
        sum_high(weight + rows),
        sum_low(sum_high + rows),
        slots(sum_low + rows),
        squares_high(slots),
        squares_low(slots + rows) {}

  int64_t* row;
  int64_t* id;
  int64_t* leader;
  Word* count;
  Word *low, *high;  // ordered(reward)
  Word* weight;
  Word *sum_high, *sum_low;
  Word* slots;  // [2 rows], place of a leader plus one, or zero
  Word *squares_high, *squares_low;  // once all leaders are known, in the memory of the slots
};

struct GroupStatistics {
  double count, low, high, mean, variance;

  __device__ __forceinline__ bool equal() const { return low == high; }
};

// Mean within the range of the values, which rounding might leave.
__device__ __forceinline__ double mean_within(double sum, double weight, double low, double high) {
  const double quotient = weight > 0 ? sum / weight : 0;
  return quotient < low ? low : quotient > high ? high : quotient;
}

// The same mixing of an id for every block; rows are shared out by the upper bits.
__device__ __forceinline__ unsigned block_of(int64_t id, unsigned blocks) {
  const auto bits = static_cast<uint64_t>(id);
  const uint32_t mixed = static_cast<uint32_t>(bits) * 0x9e3779b1u + static_cast<uint32_t>(bits >> 32) * 0x85ebca77u;
  return static_cast<unsigned>((uint64_t{mixed} * blocks) >> 32);
}

__device__ __forceinline__ int64_t first_slot(int64_t id, int64_t slots) {
  uint64_t mixed = static_cast<uint64_t>(id);
  mixed = (mixed ^ (mixed >> 32)) * 0x9e3779b97f4a7c15u;
  mixed = (mixed ^ (mixed >> 29)) * 0xbf58476d1ce4e5b9u;
  return static_cast<int64_t>(((mixed >> 32) * static_cast<uint64_t>(slots)) >> 32);
}

__device__ __forceinline__ int64_t find_leader(const GroupTable& table, int64_t place, int64_t rows) {
  const int64_t id = table.id[place];
  for (int64_t slot = first_slot(id, 2 * rows);; slot = slot + 1 < 2 * rows ? slot + 1 : 0) {
    const Word found = atomicCAS(&table.slots[slot], Word{0}, static_cast<Word>(place + 1));
    if (found == 0) return place;
    const auto leader = static_cast<int64_t>(found - 1);
    if (table.id[leader] == id) return leader;
  }
}

// Brings each active lane's value to its leader with `commit(leader, value)`, an atomic. A large group would
// make its lanes queue, so a leader that many lanes share gets their values combined. All lanes must call.
template <class Combine, class Commit>
__device__ __forceinline__ void to_leaders(bool active, int64_t leader, Word value, Word identity, Combine combine,
                                           Commit commit) {
  constexpr int kWorthwhile = 8;
  unsigned waiting = __ballot_sync(kFullWarp, active);
#pragma unroll 1
  for (int turn = 0; turn < 2 && __popc(waiting) >= kWorthwhile; ++turn) {
    const int first = __ffs(static_cast<int>(waiting)) - 1;
    const int64_t shared = __shfl_sync(kFullWarp, static_cast<long long>(leader), first);
    const bool mine = active && leader == shared;
    const unsigned peers = __ballot_sync(kFullWarp, mine);
    if (__popc(peers) < kWorthwhile) break;
    const Word combined = warp_reduce(mine ? value : identity, combine);
    if (static_cast<int>(threadIdx.x) % kWarpSize == first) commit(shared, combined);
    active = active && !mine;
    waiting &= ~peers;
  }
  if (active) commit(leader, value);
}

__device__ __forceinline__ void add_to_leaders(bool active, int64_t leader, Word value, Word* sums) {
  to_leaders(active, leader, value, Word{0}, Sum{}, [sums](int64_t at, Word added) { atomicAdd(&sums[at], added); });
}

// --- statistics of all rows ---------------------------------------------------------------------------------------

struct Moments {
  double count, low, high, weight, mean, squares;

  __device__ __forceinline__ bool equal() const { return low == high; }
  __device__ __forceinline__ double variance(int ddof) const { return weight > ddof ? squares / (weight - ddof) : 0; }
};

// Of the rows for which `read(row, value, weight)` is true, by one block in one fixed order.
template <class Read>
__device__ __forceinline__ Moments block_moments(int64_t rows, WarpValues<double>& shared, Read read) {
  Moments moments{0, HUGE_VAL, -HUGE_VAL, 0, 0, 0};
  double sum = 0, value, weight;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    if (!read(row, value, weight)) continue;
    moments.count += 1;
    moments.low = value < moments.low ? value : moments.low;
    moments.high = value > moments.high ? value : moments.high;
    moments.weight += weight;
    sum += weight * value;
  }
  moments.count = block_reduce(moments.count, 0.0, Sum{}, shared);
  moments.low = block_reduce(moments.low, HUGE_VAL, Smallest{}, shared);
  moments.high = block_reduce(moments.high, -HUGE_VAL, Largest{}, shared);
  moments.weight = block_reduce(moments.weight, 0.0, Sum{}, shared);
  moments.mean = mean_within(block_reduce(sum, 0.0, Sum{}, shared), moments.weight, moments.low, moments.high);
  double squares = 0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    if (!read(row, value, weight)) continue;
    const double distance = value - moments.mean;
    squares += weight * distance * distance;
  }
  moments.squares = block_reduce(squares, 0.0, Sum{}, shared);
  return moments;
}

// --- the kernel -----------------------------------------------------------------------------------------------------

// Of a row, for the block that whitens.
enum RowState : uint8_t { kLeftOut, kWithoutSignal, kWithSignal };

struct AdvantageShared {
  unsigned taken;
  Word counts[4];
  Word before;  // rows of the blocks before this one
  bool last;
  WarpValues<double> values;
};

template <class T>
class GroupAdvantages {
 public:
  __device__ __forceinline__ GroupAdvantages(const AdvantageParams& params, unsigned char* memory,
                                             AdvantageShared& shared)
      : p_(params),
        rewards_(static_cast<const T*>(params.rewards)),
        given_(static_cast<const T*>(params.baseline_rewards)),
        advantages_(static_cast<T*>(params.advantages)),
        shared_(shared),
        table_(memory, kSharedGroupRows) {}

  __device__ __forceinline__ void run() {
    take_rows();
    find_groups();
    if (needs_mean()) add_up();
    double batch_deviation = 0;
    if (p_.scale == Scale::batch_std) {
      const Moments batch = block_moments(p_.rows, shared_.values, [&](int64_t row, double& value, double& weight) {
        value = static_cast<double>(rewards_[row]);
        weight = 1;
        return takes_part(row);
      });
      batch_deviation = batch.count > 1 ? sqrt(batch.variance(p_.ddof)) : 1;
    }
    write_rows(batch_deviation);
    if (p_.scale == Scale::token_whiten) whiten();
  }

 private:
  __device__ __forceinline__ bool takes_part(int64_t row) const {
    return is_finite(static_cast<double>(rewards_[row])) && (!given_ || is_finite(static_cast<double>(given_[row])));
  }
  __device__ __forceinline__ bool grouped() const {
    return p_.baseline != Baseline::none && p_.baseline != Baseline::given;
  }
  __device__ __forceinline__ bool needs_mean() const { return grouped() || p_.scale == Scale::group_std; }
  __device__ __forceinline__ int64_t length(int64_t row) const {
    return p_.lengths && p_.lengths[row] > 0 ? p_.lengths[row] : 0;
  }
  __device__ __forceinline__ int64_t weight(int64_t row) const {
    return p_.baseline == Baseline::length_weighted ? length(row) : 1;
  }

  // Lists the rows of this block, as far as they fit, and counts them. Every block looks at all rows, so each
  // gets no more than a bit of a thread's attention.
  __device__ __forceinline__ void list_rows(unsigned room) {
    constexpr unsigned kAtOnce = 8;
    const unsigned rows = static_cast<unsigned>(p_.rows), threads = blockDim.x;
    for (unsigned first = threadIdx.x; first < rows; first += threads * kAtOnce) {
      int64_t ids[kAtOnce];
#pragma unroll
      for (unsigned turn = 0; turn < kAtOnce; ++turn) {
        const unsigned row = first + threads * turn;
        ids[turn] = row < rows ? p_.ids[row] : 0;
      }
      unsigned found = 0;
#pragma unroll
      for (unsigned turn = 0; turn < kAtOnce; ++turn) {
        const bool mine = first + threads * turn < rows && block_of(ids[turn], gridDim.x) == blockIdx.x;
        found |= (mine ? 1u : 0u) << turn;
      }
      if (found == 0) continue;
      unsigned place = atomicAdd(&shared_.taken, static_cast<unsigned>(__popc(found)));
      for (; found != 0 && place < room; found &= found - 1, ++place) {
        const unsigned row = first + threads * static_cast<unsigned>(__ffs(static_cast<int>(found)) - 1);
        table_.row[place] = row;
        table_.id[place] = p_.ids[row];
      }
    }
  }

  __device__ __forceinline__ void count_rows_of_blocks_before() {
    Word before = 0;
    for (int64_t row = threadIdx.x; row < p_.rows; row += blockDim.x) {
      before += block_of(p_.ids[row], gridDim.x) < blockIdx.x;
    }
    before = warp_reduce(before, Sum{});
    if (threadIdx.x % kWarpSize == 0 && before > 0) atomicAdd(&shared_.before, before);
  }

  __device__ __forceinline__ void take_rows() {
    if (threadIdx.x < 4) shared_.counts[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
      shared_.taken = 0;
      shared_.before = 0;
    }
    __syncthreads();
    list_rows(kSharedGroupRows);
    __syncthreads();
    rows_ = shared_.taken;
    if (rows_ <= kSharedGroupRows) return;
    // They need a table in global memory: the part of it that lies beyond those of the blocks before.
    __syncthreads();
    if (threadIdx.x == 0) shared_.taken = 0;
    count_rows_of_blocks_before();
    __syncthreads();
    table_ = GroupTable(p_.tables + static_cast<int64_t>(shared_.before) * kGroupRowBytes, rows_);
    list_rows(static_cast<unsigned>(rows_));
    __syncthreads();
  }

  // Visits the rows of this block, a warp at a time: `visit(here, place)`, where a lane may have no row.
  template <class Visit>
  __device__ __forceinline__ void for_rows(Visit visit) {
    const int64_t lane = threadIdx.x % kWarpSize;
    for (int64_t first = threadIdx.x - lane; first < rows_; first += blockDim.x) {
      visit(first + lane < rows_, first + lane);
    }
  }

  __device__ __forceinline__ void find_groups() {
    for (int64_t place = threadIdx.x; place < rows_; place += blockDim.x) {
      table_.count[place] = table_.weight[place] = table_.sum_high[place] = table_.sum_low[place] = 0;
      table_.low[place] = ~Word{0};
      table_.high[place] = 0;
      table_.slots[place] = table_.slots[rows_ + place] = 0;
    }
    __syncthreads();
    int left_out = 0, groups = 0;
    for_rows([&](bool here, int64_t place) {
      int64_t leader = 0, row = 0;
      if (here) {
        row = table_.row[place];
        leader = find_leader(table_, place, rows_);
        table_.leader[place] = leader;
        groups += leader == place;
      }
      const bool part = here && takes_part(row);
      left_out += here && !part;
      const Word reward = part ? ordered(static_cast<double>(rewards_[row])) : 0;
      add_to_leaders(part, leader, 1, table_.count);
      if (p_.baseline == Baseline::length_weighted) {
        add_to_leaders(part, leader, part ? static_cast<Word>(length(row)) : 0, table_.weight);
      }
      to_leaders(part, leader, reward, ~Word{0}, Smallest{},
                 [&](int64_t at, Word value) { atomicMin(&table_.low[at], value); });
      to_leaders(part, leader, reward, Word{0}, Largest{},
                 [&](int64_t at, Word value) { atomicMax(&table_.high[at], value); });
    });
    __syncthreads();
    int equal = 0, singletons = 0;
    for (int64_t place = threadIdx.x; place < rows_; place += blockDim.x) {
      if (table_.leader[place] == place) {
        const GroupStatistics group = range_of(place);
        equal += group.count > 1 && group.equal();
        singletons += group.count == 1;
      }
      table_.squares_high[place] = table_.squares_low[place] = 0;
    }
    report(left_out, groups, equal, singletons);
    __syncthreads();
  }

  __device__ __forceinline__ void report(int left_out, int groups, int equal, int singletons) {
    const int sums[4] = {__reduce_add_sync(kFullWarp, left_out), __reduce_add_sync(kFullWarp, groups),
                         __reduce_add_sync(kFullWarp, equal), __reduce_add_sync(kFullWarp, singletons)};
    if (threadIdx.x % kWarpSize == 0) {
      for (int index = 0; index < 4; ++index) {
        if (sums[index] > 0) atomicAdd(&shared_.counts[index], static_cast<Word>(sums[index]));
      }
    }
    __syncthreads();
    if (threadIdx.x < 4 && shared_.counts[threadIdx.x] > 0) {
      atomicAdd(&p_.counts[threadIdx.x], shared_.counts[threadIdx.x]);
    }
  }

  __device__ __forceinline__ double weight_of(int64_t leader) const {
    return static_cast<double>(p_.baseline == Baseline::length_weighted ? table_.weight[leader] : table_.count[leader]);
  }

  __device__ __forceinline__ GroupStatistics range_of(int64_t leader) const {
    return {static_cast<double>(table_.count[leader]), from_ordered(table_.low[leader]),
            from_ordered(table_.high[leader]), 0, 0};
  }

  __device__ __forceinline__ FixedPoint unit_of_sum(const GroupStatistics& group, int64_t leader) const {
    const double low = fabs(group.low), high = fabs(group.high);
    return {low > high ? low : high, weight_of(leader)};
  }

  __device__ __forceinline__ GroupStatistics with_mean(int64_t leader) const {
    GroupStatistics group = range_of(leader);
    const double sum = unit_of_sum(group, leader).join(table_.sum_high[leader], table_.sum_low[leader]);
    group.mean = mean_within(sum, weight_of(leader), group.low, group.high);
    return group;
  }

  // The square of a group's range, which bounds the squares of the distances from its mean.
  static __device__ __forceinline__ double largest_square(const GroupStatistics& group) {
    return (group.high - group.low) * (group.high - group.low);
  }

  __device__ __forceinline__ GroupStatistics with_variance(int64_t leader) const {
    GroupStatistics group = with_mean(leader);
    const double largest = largest_square(group), weight = weight_of(leader);
    const double squares = is_finite(largest)
                               ? FixedPoint(largest, group.count).join(table_.squares_high[leader],
                                                                       table_.squares_low[leader])
                               : HUGE_VAL;
    group.variance = weight > p_.ddof ? squares / (weight - p_.ddof) : 0;
    return group;
  }

  __device__ __forceinline__ void add_up() {
    for_rows([&](bool here, int64_t place) {
      const int64_t row = here ? table_.row[place] : 0, leader = here ? table_.leader[place] : 0;
      const bool part = here && takes_part(row);
      Word high = 0, low = 0;
      if (part) {
        const double term = static_cast<double>(weight(row)) * static_cast<double>(rewards_[row]);
        unit_of_sum(range_of(leader), leader).cut(term, high, low);
      }
      add_to_leaders(part, leader, high, table_.sum_high);
      add_to_leaders(part, leader, low, table_.sum_low);
    });
    __syncthreads();
    if (p_.scale != Scale::group_std) return;
    for_rows([&](bool here, int64_t place) {
      const int64_t row = here ? table_.row[place] : 0, leader = here ? table_.leader[place] : 0;
      Word high = 0, low = 0;
      bool part = here && takes_part(row);
      if (part) {
        const GroupStatistics group = with_mean(leader);
        const double largest = largest_square(group), distance = static_cast<double>(rewards_[row]) - group.mean;
        part = largest > 0 && is_finite(largest);
        if (part) FixedPoint(largest, group.count).cut(distance * distance, high, low);
      }
      add_to_leaders(part, leader, high, table_.squares_high);
      add_to_leaders(part, leader, low, table_.squares_low);
    });
    __syncthreads();
  }

  // The distance from the baseline; exactly zero for equal rewards, whose computed mean may be off by a rounding.
  __device__ __forceinline__ double centred(int64_t row, const GroupStatistics& group, double group_weight) const {
    const double reward = static_cast<double>(rewards_[row]);
    if (p_.baseline == Baseline::none) return reward;
    if (p_.baseline == Baseline::given) return reward - static_cast<double>(given_[row]);
    if (group.count == 1) return p_.singleton_self ? reward : 0;
    if (group.equal() || !(group_weight > 0)) return 0;
    return (reward - group.mean) * (p_.baseline == Baseline::leave_one_out ? group.count / (group.count - 1) : 1);
  }

  __device__ __forceinline__ void write_rows(double batch_deviation) {
    for (int64_t place = threadIdx.x; place < rows_; place += blockDim.x) {
      const int64_t row = table_.row[place], leader = table_.leader[place];
      double distance = 0;
      RowState state = kLeftOut;
      GroupStatistics group{};
      if (takes_part(row)) {
        group = !needs_mean()                       ? range_of(leader)
                : p_.scale == Scale::group_std ? with_variance(leader)
                                               : with_mean(leader);
        distance = centred(row, group, weight_of(leader));
        const bool without = grouped() && (group.count == 1 ? !p_.singleton_self : group.equal());
        state = without ? kWithoutSignal : kWithSignal;
      }
      if (p_.scale == Scale::token_whiten) {
        p_.centred[row] = distance;
        p_.states[row] = state;
        continue;
      }
      double divisor = 1;
      if (p_.scale == Scale::group_std) divisor = (group.count > 1 ? sqrt(group.variance) : 1) + p_.eps;
      if (p_.scale == Scale::batch_std) divisor = batch_deviation + p_.eps;
      advantages_[row] = static_cast<T>(state == kWithSignal ? distance / divisor : 0);
    }
  }

  // The block that finishes last sees the rows of all: each token of a row carries its row's distance.
  __device__ __forceinline__ void whiten() {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared_.last = atomicAdd(p_.finished, Word{1}) == gridDim.x - 1;
    __syncthreads();
    if (!shared_.last) return;
    __threadfence();
    const Moments tokens = block_moments(p_.rows, shared_.values, [&](int64_t row, double& value, double& weight) {
      value = __ldcg(p_.centred + row);
      weight = static_cast<double>(length(row));
      return __ldcg(p_.states + row) != kLeftOut && weight > 0;
    });
    const double divisor = sqrt(tokens.variance(p_.ddof) + p_.eps);
    for (int64_t row = threadIdx.x; row < p_.rows; row += blockDim.x) {
      const bool signal = __ldcg(p_.states + row) == kWithSignal && length(row) > 0 && !tokens.equal();
      advantages_[row] = static_cast<T>(signal ? (__ldcg(p_.centred + row) - tokens.mean) / divisor : 0);
    }
  }

  const AdvantageParams& p_;
  const T* rewards_;
  const T* given_;
  T* advantages_;
  AdvantageShared& shared_;
  GroupTable table_;
  int64_t rows_ = 0;
};

constexpr int kAdvantageThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kAdvantageThreads) group_advantages_kernel(AdvantageParams params) {
  PYKERN_DYNAMIC_SHARED(memory);
  PYKERN_SHARED(AdvantageShared, shared);
  GroupAdvantages<T>(params, memory, shared).run();
}

}  // namespace pykern
