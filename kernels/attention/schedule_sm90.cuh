// Which tiles of queries a block of the forward takes, and which tiles of keys each of them sees.
#pragma once

#include "kernels/attention/head_sizes.h"
#include "kernels/attention/visibility.cuh"

namespace pykern {

constexpr int kForwardRows = 128;  // of a tile of queries: packed heads of neighbouring tokens

struct ForwardQueries {
  int first, stop;  // tokens, stop clipped
  int key_head, first_head;
};

// All tiles in one sequence, the longest first. The key heads are cut into sections whose keys and values stay in the
// second-level cache; within a section a block of tokens comes with all its tiles.
struct QuerySchedule {
  int packed_log2;    // of the heads in a tile
  int section_heads;  // key heads of a section
  int blocks;         // of kOrderTokens tokens
  int tiles;

  explicit QuerySchedule(const PrefixAttentionProblem& problem) {
    const int packed = packed_heads(problem.query_heads, problem.key_heads);
    packed_log2 = 0;
    while (1 << packed_log2 < packed) ++packed_log2;
    // Half of the cache; on the emulator little, so that tests meet several sections.
    constexpr int64_t kSectionBytes = kEmulated ? 16 << 10 : 32 << 20;
    const int64_t head_bytes = problem.tokens * (problem.key_size + problem.value_size) * 2;
    const int64_t heads = kSectionBytes / head_bytes;
    section_heads = static_cast<int>(heads < 1 ? 1 : heads < problem.key_heads ? heads : problem.key_heads);
    blocks = static_cast<int>((problem.tokens + kOrderTokens - 1) / kOrderTokens);
    tiles = blocks * problem.query_heads;
  }

  // The tile that comes `turn`-th for this block, or false after the last. Blocks take turns back and forth, so that
  // the one with the longest tile of a turn has the shortest of the next.
  __device__ __forceinline__ bool find(const PrefixAttentionProblem& problem, int& turn, ForwardQueries& tile) const {
    const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    for (;; ++turn) {
      const int index = turn * grid + (turn % 2 == 0 ? block : grid - 1 - block);
      if (index >= tiles) return false;
      place(problem, index, tile);
      // The last block of tokens may hold tiles beyond them.
      if (tile.first < tile.stop) return true;
    }
  }

 private:
  __device__ __forceinline__ void place(const PrefixAttentionProblem& problem, int index, ForwardQueries& tile) const {
    const int group = problem.query_heads / problem.key_heads;
    const int section_tiles = blocks * section_heads * group, section = index / section_tiles;
    const int first_key_head = section * section_heads, heads_left = problem.key_heads - first_key_head;
    const int block_tiles = (heads_left < section_heads ? heads_left : section_heads) * group;
    index -= section * section_tiles;
    const int rank = index / block_tiles;
    index -= rank * block_tiles;
    // A block of 128 tokens is as many tiles as heads are packed.
    const int head = index / group, within = index - head * group, part = within >> packed_log2;
    const int tokens_log2 = 7 - packed_log2;
    tile.key_head = first_key_head + head;
    tile.first_head = tile.key_head * group + (part << packed_log2);
    tile.first = __ldg(problem.query_order + rank) * kOrderTokens + ((within - (part << packed_log2)) << tokens_log2);
    const int stop = tile.first + (1 << tokens_log2), tokens = static_cast<int>(problem.tokens);
    tile.stop = stop < tokens ? stop : tokens;
  }
};
static_assert(kForwardRows == kOrderTokens, "a block of the order is one tile for each of the packed heads");

// A tile of keys as the copying warp hands it on: its first key, a multiple of 64, and what is to be known of it.
struct KeyTile {
  int bits;

  static constexpr int kMasked = 1, kPadding = 2, kFirst = 4, kLast = 8, kFlags = kBoundsTokens - 1;
  __device__ __forceinline__ int first() const { return bits & ~kFlags; }
  __device__ __forceinline__ bool is_masked() const { return bits & kMasked; }
  __device__ __forceinline__ bool is_first() const { return bits & kFirst; }
  __device__ __forceinline__ bool is_last() const { return bits & kLast; }
  // Keys that no query sees, whose values may be anything.
  __device__ __forceinline__ bool has_padding() const { return bits & kPadding; }
};

// The tiles of `kKeys` keys that some query of a tile sees, in rising order. Where there are none, the first tile,
// masked: so every tile of queries has one. All lanes of a warp call; 128 tiles are looked at together, so that long
// stretches which nobody sees pass quickly.
template <int kKeys>
class VisibleKeyTiles {
 public:
  __device__ __forceinline__ VisibleKeyTiles(const PrefixAttentionProblem& problem, const ForwardQueries& queries)
      : problem_(problem),
        queries_(queries),
        bounds_(token_bounds(problem, queries.first, queries.stop)),
        stop_((queries.stop + kKeys - 1) / kKeys) {
    following_ = find();
    if (following_ < 0) following_ = 0;
  }

  // To be called until a tile is the last.
  __device__ __forceinline__ KeyTile next() {
    const int first = following_ * kKeys;
    following_ = find();
    const TokenBounds keys = token_bounds(problem_, first, first + kKeys);
    const Visible visible =
        visible_keys(keys, first, first + kKeys, bounds_, queries_.first, queries_.stop, problem_.window);
    int bits = first;
    if (visible != Visible::all) bits |= KeyTile::kMasked;
    if (following_ < 0) bits |= KeyTile::kLast;
    if (keys.least_end == 0) bits |= KeyTile::kPadding;
    return {bits};
  }

 private:
  static constexpr int kLooks = 4, kRows = kKeys / kBoundsTokens;

  // The next tile that is seen, or -1.
  __device__ __forceinline__ int find() {
    while (seen_[0] == 0) {
      begin_ += kWarpSize;
      if (begin_ >= stop_) return -1;
      if (begin_ == looked_) {
        look();
        continue;
      }
#pragma unroll
      for (int i = 0; i + 1 < kLooks; ++i) seen_[i] = seen_[i + 1];
      seen_[kLooks - 1] = 0;
    }
    const int bit = __ffs(static_cast<int>(seen_[0])) - 1;
    seen_[0] &= seen_[0] - 1;
    return begin_ + bit;
  }

  __device__ __forceinline__ void look() {
    const int first = begin_ + static_cast<int>(threadIdx.x) % kWarpSize;
    bool seen[kLooks];
#pragma unroll
    for (int i = 0; i < kLooks; ++i) seen[i] = is_seen(first + i * kWarpSize);
#pragma unroll
    for (int i = 0; i < kLooks; ++i) seen_[i] = __ballot_sync(kFullWarp, seen[i]);
    looked_ = begin_ + kLooks * kWarpSize;
  }

  __device__ __forceinline__ bool is_seen(int tile) const {
    const int last_row = static_cast<int>((problem_.tokens - 1) / kBoundsTokens);
    bool seen = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = tile * kRows + i;
      const int32_t* bounds = problem_.bounds + int64_t{4} * (row < last_row ? row : last_row);
      bool sees = __ldg(bounds + 1) > queries_.first;
      if (problem_.window > 0) {
        sees = sees && !leaves_window(bounds_.least_position, __ldg(bounds + 3), problem_.window);
      }
      seen = seen || sees;
    }
    return seen && tile < stop_;
  }

  const PrefixAttentionProblem& problem_;
  const ForwardQueries& queries_;
  // Aligned since a host compiler stores them as one.
  alignas(16) TokenBounds bounds_;  // of the queries
  int stop_;                     // tiles
  int begin_ = -kWarpSize;       // the tile of the lowest bit of seen_[0]
  int looked_ = 0;               // tiles that have been looked at
  int following_;                // the tile that next() returns
  alignas(16) unsigned seen_[kLooks] = {};
};

}  // namespace pykern
