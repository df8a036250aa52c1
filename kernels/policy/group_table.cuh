// Groups of rows, found in one launch. Every block reads all ids and owns the groups whose id hashes to it, so
// that no block waits for another. Its rows go into a list in no particular order: nothing that uses it may
// depend on it. Groups are found with a hash table; one row of each, its leader, stands for the group.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/policy/fixed_point.cuh"

namespace pykern {

// Columns with an entry of eight bytes for each row of the block. Those of a kernel begin at kOwn, and it may use
// the two of the slots once all leaders are known. What is a group's is at the place of its leader.
struct GroupTable {
  enum Column : int { kRow, kId, kLeader, kSlots, kOwn = kSlots + 2 };

  unsigned char* memory;
  int64_t rows;

  __device__ __forceinline__ int64_t* integers(int column) const {
    return reinterpret_cast<int64_t*>(memory) + column * rows;
  }
  __device__ __forceinline__ Word* words(int column) const { return reinterpret_cast<Word*>(memory) + column * rows; }
  __device__ __forceinline__ double* numbers(int column) const {
    return reinterpret_cast<double*>(memory) + column * rows;
  }
  __device__ __forceinline__ int64_t& row(int64_t place) const { return integers(kRow)[place]; }
  __device__ __forceinline__ int64_t& id(int64_t place) const { return integers(kId)[place]; }
  __device__ __forceinline__ int64_t& leader(int64_t place) const { return integers(kLeader)[place]; }
};

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

// The place that stands for all whose `same(place)` is true: the first to come. `slots` [2 rows] hold places plus
// one, or zero; the search begins where `key` says.
template <class Same>
__device__ __forceinline__ int64_t find_leader(Word* slots, int64_t rows, int64_t key, int64_t place, Same same) {
  for (int64_t slot = first_slot(key, 2 * rows);; slot = slot + 1 < 2 * rows ? slot + 1 : 0) {
    const Word found = atomicCAS(&slots[slot], Word{0}, static_cast<Word>(place + 1));
    if (found == 0) return place;
    const auto leader = static_cast<int64_t>(found - 1);
    if (same(leader)) return leader;
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
__device__ __forceinline__ void lower_leaders(bool active, int64_t leader, Word value, Word* lowest) {
  to_leaders(active, leader, value, ~Word{0}, Smallest{},
             [lowest](int64_t at, Word lower) { atomicMin(&lowest[at], lower); });
}
__device__ __forceinline__ void raise_leaders(bool active, int64_t leader, Word value, Word* highest) {
  to_leaders(active, leader, value, Word{0}, Largest{},
             [highest](int64_t at, Word higher) { atomicMax(&highest[at], higher); });
}

struct BlockGroupsShared {
  unsigned taken;
  Word before;  // rows of the blocks before this one
};

// The rows of this block and its groups.
class BlockGroups {
 protected:
  // `memory` has room for `room` rows of `columns`; `tables` in global memory for all.
  __device__ __forceinline__ BlockGroups(const int64_t* ids, int64_t all_rows, int columns, unsigned char* memory,
                                         int64_t room, unsigned char* tables, BlockGroupsShared& shared)
      : table_{memory, room}, ids_(ids), all_rows_(all_rows), columns_(columns), tables_(tables), taking_(shared) {}

  __device__ __forceinline__ void take_rows() {
    if (threadIdx.x == 0) {
      taking_.taken = 0;
      taking_.before = 0;
    }
    __syncthreads();
    list_rows(static_cast<unsigned>(table_.rows));
    __syncthreads();
    rows_ = taking_.taken;
    if (rows_ <= table_.rows) return;
    // They need a table in global memory: the part of it that lies beyond those of the blocks before.
    __syncthreads();
    if (threadIdx.x == 0) taking_.taken = 0;
    count_rows_of_blocks_before();
    __syncthreads();
    table_ = {tables_ + static_cast<int64_t>(taking_.before) * columns_ * 8, rows_};
    list_rows(static_cast<unsigned>(rows_));
    __syncthreads();
  }

  // Visits the rows of this block, a warp at a time: `visit(here, place)`, where a lane may have no row. The same
  // thread sees a place each time.
  template <class Visit>
  __device__ __forceinline__ void for_rows(Visit visit) {
    const int64_t lane = threadIdx.x % kWarpSize;
    for (int64_t first = threadIdx.x - lane; first < rows_; first += blockDim.x) {
      visit(first + lane < rows_, first + lane);
    }
  }
  template <class Visit>
  __device__ __forceinline__ void for_places(Visit visit) {
    for (int64_t place = threadIdx.x; place < rows_; place += blockDim.x) visit(place);
  }

  __device__ __forceinline__ void clear_slots(int64_t place) {
    table_.words(GroupTable::kSlots)[place] = table_.words(GroupTable::kSlots)[rows_ + place] = 0;
  }
  __device__ __forceinline__ int64_t leader_of_id(int64_t place) {
    const int64_t id = table_.id(place);
    return find_leader(table_.words(GroupTable::kSlots), rows_, id, place,
                       [&](int64_t leader) { return table_.id(leader) == id; });
  }

  GroupTable table_;
  int64_t rows_ = 0;

 private:
  // Lists the rows of this block, as far as they fit, and counts them. Every block looks at all rows, so each
  // gets no more than a bit of a thread's attention.
  __device__ __forceinline__ void list_rows(unsigned room) {
    constexpr unsigned kAtOnce = 8;
    const unsigned rows = static_cast<unsigned>(all_rows_), threads = blockDim.x;
    for (unsigned first = threadIdx.x; first < rows; first += threads * kAtOnce) {
      int64_t ids[kAtOnce];
#pragma unroll
      for (unsigned turn = 0; turn < kAtOnce; ++turn) {
        const unsigned row = first + threads * turn;
        ids[turn] = row < rows ? ids_[row] : 0;
      }
      unsigned found = 0;
#pragma unroll
      for (unsigned turn = 0; turn < kAtOnce; ++turn) {
        const bool mine = first + threads * turn < rows && block_of(ids[turn], gridDim.x) == blockIdx.x;
        found |= (mine ? 1u : 0u) << turn;
      }
      if (found == 0) continue;
      unsigned place = atomicAdd(&taking_.taken, static_cast<unsigned>(__popc(found)));
      for (; found != 0 && place < room; found &= found - 1, ++place) {
        const unsigned row = first + threads * static_cast<unsigned>(__ffs(static_cast<int>(found)) - 1);
        table_.row(place) = row;
        table_.id(place) = ids_[row];
      }
    }
  }

  __device__ __forceinline__ void count_rows_of_blocks_before() {
    Word before = 0;
    for (int64_t row = threadIdx.x; row < all_rows_; row += blockDim.x) {
      before += block_of(ids_[row], gridDim.x) < blockIdx.x;
    }
    before = warp_reduce(before, Sum{});
    if (threadIdx.x % kWarpSize == 0 && before > 0) atomicAdd(&taking_.before, before);
  }

  const int64_t* ids_;
  int64_t all_rows_;
  int columns_;
  unsigned char* tables_;
  BlockGroupsShared& taking_;
};

}  // namespace pykern
