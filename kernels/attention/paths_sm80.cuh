// Keys by their position on a query's path instead of their row: what makes a forward invariant to how its sequences
// are packed.
#pragma once

#include "kernels/attention/scores.cuh"
#include "kernels/common/shared_tile.cuh"

namespace pykern {

// paths[2 t] is the first row of token t's run, the longest stretch of rows that ends with t and in which every token
// is the parent of the next; paths[2 t + 1] is the parent of that first row, or -1.

constexpr int kPathsWarps = 4;

// The last token before `stop` that satisfies `token`, or -1, found by a warp. `unit` may rule out 64 tokens at once.
template <class Unit, class Token>
__device__ __forceinline__ int last_token_before(int stop, const Unit& unit, const Token& token) {
  const int lane = threadIdx.x % kWarpSize;
  while (stop > 0) {
    const int base = (stop - 1) / kBoundsTokens * kBoundsTokens;
    for (int first = (stop - 1) / kWarpSize * kWarpSize; first >= base; first -= kWarpSize) {
      const unsigned found = __ballot_sync(kFullWarp, first + lane < stop && token(first + lane));
      if (found) return first + kWarpSize - 1 - __clz(found);
    }
    stop = 0;
    for (int units = base / kBoundsTokens; units > 0 && stop == 0; units -= kWarpSize) {
      const int mine = units - 1 - lane;
      const unsigned possible = __ballot_sync(kFullWarp, mine >= 0 && unit(mine));
      if (possible) stop = (units - (__ffs(possible) - 1)) * kBoundsTokens;
    }
  }
  return -1;
}

// A warp for 32 tokens.
__global__ void __launch_bounds__(kPathsWarps * kWarpSize)
    prefix_attention_paths_kernel(const PrefixAttentionProblem problem, int32_t* paths) {
  const int tokens = static_cast<int>(problem.tokens), lane = threadIdx.x % kWarpSize;
  const int64_t window = int64_t{blockIdx.x} * kPathsWarps + threadIdx.x / kWarpSize;
  if (window * kWarpSize >= tokens) return;
  const int begin = static_cast<int>(window) * kWarpSize;
  const auto begins_run = [&](int token) {
    return token == 0 || problem.subtree_end[token - 1] <= token ||
           problem.position[token] != problem.position[token - 1] + 1;
  };
  // From one row to the next of a tree a position rises by at most 1, so 64 rows that rise by 63 are one run.
  const auto has_begin = [&](int unit) {
    const Pack<int32_t> bounds = load_pack(problem.bounds + int64_t{4} * unit);
    const int first = unit * kBoundsTokens;
    return bounds[3] - bounds[2] != kBoundsTokens - 1 || problem.position[first] != bounds[2] || begins_run(first);
  };
  const unsigned begins = __ballot_sync(kFullWarp, begin + lane < tokens && begins_run(begin + lane));
  int first_row = begins & 1 ? begin : last_token_before(begin, has_begin, begins_run);
  // One run after the other; its first row may lie before the warp's tokens.
  for (int offset = 0; offset < kWarpSize;) {
    const auto reaches_unit = [&](int unit) { return problem.bounds[int64_t{4} * unit + 1] > first_row; };
    const auto reaches = [&](int token) { return problem.subtree_end[token] > first_row; };
    const int parent = problem.position[first_row] == 0 ? -1 : last_token_before(first_row, reaches_unit, reaches);
    const unsigned later = offset + 1 < kWarpSize ? begins >> (offset + 1) << (offset + 1) : 0;
    const int next = later ? __ffs(later) - 1 : kWarpSize;
    if (lane >= offset && lane < next && begin + lane < tokens) {
      paths[2 * (int64_t{begin} + lane)] = first_row;
      paths[2 * (int64_t{begin} + lane) + 1] = parent;
    }
    offset = next;
    first_row = begin + next;
  }
}

// Neighbouring rows of a path, from the first of a run up.
struct PathSegment {
  int32_t first_row, first_position, parent;

  // The segment that ends with a token.
  __device__ __forceinline__ PathSegment(const PrefixAttentionForward& params, int token)
      : first_row(params.paths[2 * int64_t{token}]),
        first_position(params.position[token] - (token - first_row)),
        parent(params.paths[2 * int64_t{token} + 1]) {}

  // To the segment of the path that holds a position. It ends for any tensors: a parent comes before its run.
  __device__ __forceinline__ void climb(const PrefixAttentionForward& params, int position) {
    while (position < first_position && parent >= 0) *this = PathSegment(params, parent);
  }

  // The row of a position, or -1 where tensors that are no tree have none.
  __device__ __forceinline__ int row(const PrefixAttentionForward& params, int position) const {
    const uint32_t row = static_cast<uint32_t>(first_row) + static_cast<uint32_t>(position) - first_position;
    return position >= first_position && row < params.tokens ? static_cast<int>(row) : -1;
  }
};

// Tiles of keys along the paths of the queries [first_query, stop_query), run by run: `keys` positions each, cut at
// multiples of `keys`, in falling order, so that the walk up a path goes on from tile to tile. All threads walk alike.
template <int keys>
class PathTiles {
 public:
  // What the scores of a tile need to know: queries [begin, stop) take part, and see positions up to last_key.
  struct Tile {
    int first_key, last_key, begin, stop;

    // Whether it concerns any of the queries [first, last].
    __device__ __forceinline__ bool concerns(int first, int last) const { return begin <= last && first < stop; }

    // Every tile is masked: one and the same code for all packings.
    __device__ __forceinline__ bool changes(const ScoreRule&) const { return true; }
    __device__ __forceinline__ bool asks_positions(const ScoreRule&) const { return true; }

    template <int m, int n>
    __device__ __forceinline__ void apply(const ScoreRule& rule, const QueryRows (&rows)[m], int first_column,
                                          float (&s)[m][n]) const {
      const int first = first_key + first_column;
#pragma unroll
      for (int tile = 0; tile < m; ++tile) {
        transform_products(rule, rows[tile], [&](int column) { return first + column; }, s[tile]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // A row of another run, as row -1, sees nothing.
          const int token = rows[tile].token[i], position = rows[tile].position[i];
          int last = token >= begin && token < stop ? position : -1;
          last = last < last_key ? last : last_key;
          const int before = rule.window > 0 ? position - rule.window : -1;
#pragma unroll
          for (int j = 0; j < n / 4; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int key = first + 8 * j + c;
              if (key > last || key <= before) s[tile][4 * j + 2 * i + c] = -INFINITY;
            }
          }
        }
      }
    }
  };

  __device__ __forceinline__ PathTiles(const PrefixAttentionForward& params, int first_query, int stop_query)
      : params_(params),
        first_query_(first_query),
        lowest_(0),
        tile_{0, 0, stop_query < params.tokens ? stop_query : static_cast<int>(params.tokens), 0},
        segment_(params, tile_.begin - 1) {}

  __device__ __forceinline__ bool advance() {
    tile_.first_key -= keys;
    while (tile_.first_key < lowest_) {
      if (tile_.begin <= first_query_) return false;
      start_run(tile_.begin - 1);
    }
    const int last = tile_.first_key + keys - 1;
    segment_.climb(params_, last < tile_.last_key ? last : tile_.last_key);
    return true;
  }

  __device__ __forceinline__ const Tile& tile() const { return tile_; }

  // For copy_rows: where the keys' rows of a tensor lie, `stride` bytes apart.
  __device__ __forceinline__ auto sources(const unsigned char* data, uint32_t stride) const {
    return [this, data, stride, segment = segment_](int key) mutable {
      const int position = tile_.first_key + key;
      const bool exists = position <= tile_.last_key;
      if (exists) segment.climb(params_, position);
      const int row = exists ? segment.row(params_, position) : -1;
      return RowSource{data + uint64_t{static_cast<uint32_t>(row)} * stride, row >= 0};
    };
  }

  // Whether some values of the tile are seen by no query.
  __device__ __forceinline__ bool has_unseen() const { return false; }
  template <class Sources>
  __device__ __forceinline__ Sources without_unseen(Sources sources) const {
    return sources;
  }

 private:
  // The run that ends with a query.
  __device__ __forceinline__ void start_run(int last_query) {
    segment_ = PathSegment(params_, last_query);
    tile_.begin = segment_.first_row > first_query_ ? segment_.first_row : first_query_;
    tile_.stop = last_query + 1;
    // Padding, which only ends a run, doesn't see itself. No position of a tree exceeds its row.
    const int32_t position = params_.position[last_query];
    tile_.last_key = (position < last_query ? position : last_query) - (params_.subtree_end[last_query] <= last_query);
    const int32_t least = params_.window > 0 ? params_.position[tile_.begin] - params_.window + 1 : 0;
    lowest_ = least > 0 ? least / keys * keys : 0;
    tile_.first_key = tile_.last_key >= 0 ? tile_.last_key / keys * keys : -keys;
  }

  const PrefixAttentionForward& params_;
  int first_query_, lowest_;
  Tile tile_;
  PathSegment segment_;
};

}  // namespace pykern
