// The entropy of the answers in each group, in one launch: a second search of the hash table finds, within a group,
// the rows of one answer. Sums run in fixed point, so they are the same in any order.
#pragma once

#include <cmath>

#include "kernels/policy/advantages.h"
#include "kernels/policy/group_table.cuh"

namespace pykern {

class GroupEntropy : BlockGroups {
 public:
  __device__ __forceinline__ GroupEntropy(const EntropyParams& params, unsigned char* memory, BlockGroupsShared& shared)
      : BlockGroups(params.ids, params.rows, kColumns, memory, kSharedGroupRows, params.tables, shared), p_(params) {}

  __device__ __forceinline__ void run() {
    take_rows();
    for_places([&](int64_t place) {
      clear_slots(place);
      table_.words(kSize)[place] = table_.words(kGiven)[place] = 0;
      table_.words(kSumHigh)[place] = table_.words(kSumLow)[place] = 0;
    });
    __syncthreads();
    for_rows([&](bool here, int64_t place) {
      const int64_t leader = here ? leader_of_id(place) : 0;
      if (here) table_.leader(place) = leader;
      add_to_leaders(here, leader, 1, table_.words(kSize));
    });
    __syncthreads();
    for_places([&](int64_t place) { clear_slots(place); });
    __syncthreads();
    for_rows([&](bool here, int64_t place) {
      int64_t first = 0;
      if (here) {
        const int64_t leader = table_.leader(place), answer = p_.answers[table_.row(place)];
        const auto mixed = static_cast<uint64_t>(answer) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(leader);
        first = find_leader(table_.words(kSlots), rows_, static_cast<int64_t>(mixed), place, [&](int64_t other) {
          return table_.leader(other) == leader && p_.answers[table_.row(other)] == answer;
        });
      }
      add_to_leaders(here, first, 1, table_.words(kGiven));
    });
    __syncthreads();
    // Each answer's first row, which has its count, adds its term to the group's sum.
    for_rows([&](bool here, int64_t place) {
      const bool first = here && table_.words(kGiven)[place] > 0;
      const int64_t leader = here ? table_.leader(place) : 0;
      Word high = 0, low = 0;
      if (first) {
        const double size = static_cast<double>(table_.words(kSize)[leader]);
        const double share = static_cast<double>(table_.words(kGiven)[place]) / size;
        FixedPoint(1, size).cut(-share * log2(share), high, low);
      }
      add_to_leaders(first, leader, high, table_.words(kSumHigh));
      add_to_leaders(first, leader, low, table_.words(kSumLow));
    });
    __syncthreads();
    for_places([&](int64_t place) {
      const int64_t row = table_.row(place), leader = table_.leader(place);
      const Word size = table_.words(kSize)[leader];
      p_.entropy[row] = FixedPoint(1, static_cast<double>(size))
                            .join(table_.words(kSumHigh)[leader], table_.words(kSumLow)[leader]);
      p_.sizes[row] = static_cast<int64_t>(size);
    });
  }

 private:
  enum Column : int {
    kSlots = GroupTable::kSlots,
    kSize = GroupTable::kOwn,  // of the group
    kGiven,                    // how often a row's answer was, at the first row of that answer
    kSumHigh,
    kSumLow,
    kColumns
  };
  static_assert(kColumns * 8 == kEntropyRowBytes, "");

  const EntropyParams& p_;
};

constexpr int kEntropyThreads = 1024;

__global__ void __launch_bounds__(kEntropyThreads) group_entropy_kernel(const __grid_constant__ EntropyParams params) {
  PYKERN_DYNAMIC_SHARED(memory);
  PYKERN_SHARED(BlockGroupsShared, shared);
  GroupEntropy(params, memory, shared).run();
}

}  // namespace pykern
