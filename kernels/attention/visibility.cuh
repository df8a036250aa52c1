// Who sees whom: tiles of queries with packed heads, and which tiles of keys they may skip.
#pragma once

#include "kernels/attention/prefix_attention.h"
#include "kernels/common/vector.cuh"

namespace pykern {

constexpr int kBoundsTokens = 64;   // of a row of bounds
constexpr int kOrderTokens = 128;  // of a block of the orders

// Query heads of one key head that share a tile: row r of a tile is head r % heads of token first + r / heads, so that
// a tile is full of queries even where sequences are short. A power of two, so that tiles divide a block.
__host__ __device__ __forceinline__ int packed_heads(int query_heads, int key_heads) {
  const int group = query_heads / key_heads;
  const int heads = group & -group;
  return heads < 16 ? heads : 16;
}

// Of one tile of 64 tokens, or of neighbouring ones joined.
struct TokenBounds {
  int32_t least_end, last_end, least_position, last_position;

  __device__ __forceinline__ void join(const TokenBounds& other) {
    least_end = other.least_end < least_end ? other.least_end : least_end;
    last_end = other.last_end > last_end ? other.last_end : last_end;
    least_position = other.least_position < least_position ? other.least_position : least_position;
    last_position = other.last_position > last_position ? other.last_position : last_position;
  }
};

// Of tokens [first, stop), widened to whole tiles of 64; stop > first, and first is a token.
__device__ __forceinline__ TokenBounds token_bounds(const PrefixAttentionProblem& problem, int first, int stop) {
  const int tiles = static_cast<int>((problem.tokens + kBoundsTokens - 1) / kBoundsTokens);
  int tile = first / kBoundsTokens;
  const auto read = [&](int index) {
    const Pack<int32_t> row = load_pack(problem.bounds + int64_t{4} * index);
    return TokenBounds{row[0], row[1], row[2], row[3]};
  };
  TokenBounds bounds = read(tile);
  for (++tile; tile * kBoundsTokens < stop && tile < tiles; ++tile) bounds.join(read(tile));
  return bounds;
}

// Whether a key lies too far before a query. Positions of padding may be any numbers: the difference of two can be too
// large for an int32, but not for as many bits without a sign.
__device__ __forceinline__ bool leaves_window(int32_t query, int32_t key, int window) {
  return query > key && static_cast<uint32_t>(query) - static_cast<uint32_t>(key) >= static_cast<uint32_t>(window);
}

enum class Visible { none, some, all };

// Whether queries [first_query, stop_query) see the keys [first_key, stop_key). `all` is exact for whole tiles of 64
// keys; a tile that reaches beyond the tokens is never seen by all. A tile called `some` may be seen by none.
__device__ __forceinline__ Visible visible_keys(const TokenBounds& keys, int first_key, int stop_key,
                                                const TokenBounds& queries, int first_query, int stop_query,
                                                int window) {
  if (first_key >= stop_query || keys.last_end <= first_query) return Visible::none;
  if (window > 0 && leaves_window(queries.least_position, keys.last_position, window)) return Visible::none;
  const bool all = stop_key - 1 <= first_query && keys.least_end >= stop_query;
  const bool in_window = window == 0 || !leaves_window(queries.last_position, keys.least_position, window);
  return all && in_window ? Visible::all : Visible::some;
}

}  // namespace pykern
