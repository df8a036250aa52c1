// Forward of prefix attention for every architecture from 8.0 on: cp.async, ldmatrix and mma.m16n8k16.
//
// A block of threads has one tile of 128 rows (queries with packed heads) and goes over the tiles of keys that they
// see. While a tile is multiplied the next one arrives. Blocks are started longest first, and a multiprocessor takes
// the next one as soon as it has room: a loop over tiles would only add a counter to that.
#pragma once

#include "kernels/attention/head_sizes.h"
#include "kernels/attention/online_softmax.cuh"
#include "kernels/attention/paths_sm80.cuh"
#include "kernels/attention/visible_units.cuh"

namespace pykern {

template <class Sizes>
struct ForwardTiling {
  static constexpr int kKey = Sizes::kKey, kValue = Sizes::kValue;
  static constexpr int kRows = 128;
  // Tiles of 16 rows of a warp. Two halve what the warp reads of keys and values from shared memory, whose bandwidth
  // is just enough for one on 8.0; the sums of larger heads leave no registers for them.
  static constexpr int kRowTiles = kKey <= 128 ? 2 : 1;
  static constexpr int kWarps = kRows / (16 * kRowTiles), kThreads = kWarps * kWarpSize;
  // As many as leave registers for two blocks of a multiprocessor (one of 256 threads), and two blocks 99 KiB.
  static constexpr int kKeys = kKey == 32 || kKey == 64 || kKey == 192 ? 64 : 32;
  // Columns of the queries that stay in registers, and leave their shared memory to a second stage of keys and values;
  // the others are read anew for every tile. At 128 there are registers for none of them: with one stage, values
  // arrive during the first product and the next keys during the second.
  static constexpr int kHeldColumns = kKey == 128 ? 0 : kKey == 96 ? 64 : kKey == 256 ? 128 : kKey;
  static constexpr int kReadColumns = kKey - kHeldColumns;
  static constexpr int kStages = kHeldColumns > 0 ? 2 : 1;
  static constexpr int kBlocks = kRowTiles == 2 ? 2 : 1;  // of a multiprocessor, at least

  static constexpr int kKeyBytes = kKeys * SharedTile<kKey>::kRowBytes;
  static constexpr int kValueBytes = kKeys * SharedTile<kValue>::kRowBytes;
  static constexpr int kStageBytes = kKeyBytes + kValueBytes;
  // The first stage; the held columns of the queries, later the second stage; the other columns.
  static constexpr int kHeldBytes = kRows * 2 * kHeldColumns;
  static constexpr int kSecondBytes = kStages == 2 && kStageBytes > kHeldBytes ? kStageBytes : kHeldBytes;
  static constexpr int kReadOffset = kStageBytes + kSecondBytes;
  static constexpr int kSharedBytes = kReadOffset + kRows * 2 * kReadColumns;
  static_assert(kSharedBytes <= 99 * 1024, "what 8.6, 8.9 and 12.0 have");
};

// Which queries the rows of a tile are.
struct QueryTile {
  int first, stop;  // tokens, no more than 128; the last tile reaches beyond the tokens
  int head_bits;    // a token has 1 << head_bits neighbouring rows
  int first_head, key_head;

  __device__ __forceinline__ QueryTile(const PrefixAttentionProblem& problem, unsigned block) {
    const int heads = packed_heads(problem.query_heads, problem.key_heads);
    head_bits = __ffs(heads) - 1;
    // Tiles of one block of tokens and one key head are neighbours, since they read the same keys.
    const int tile = heads - 1 - static_cast<int>(block & (heads - 1));
    block >>= head_bits;
    const unsigned parts = problem.query_heads / problem.key_heads >> head_bits;
    const int part = static_cast<int>(block % parts);
    block /= parts;
    key_head = static_cast<int>(block % problem.key_heads);
    first_head = (key_head * static_cast<int>(parts) + part) << head_bits;
    const int tile_tokens = kOrderTokens >> head_bits;
    first = problem.query_order[block / problem.key_heads] * kOrderTokens + tile * tile_tokens;
    stop = first + tile_tokens;
  }

  __device__ __forceinline__ int token(int row) const { return first + (row >> head_bits); }
  __device__ __forceinline__ int head(int row) const { return first_head + (row & ((1 << head_bits) - 1)); }
};

// Tiles of `keys` keys that some query of a tile sees, in rising order. All threads of a block walk alike.
template <int keys>
class VisibleTiles {
 public:
  struct Tile {
    int first_key;
    bool masked;  // some query doesn't see some key

    // Whether it concerns any of the queries [first, last].
    __device__ __forceinline__ bool concerns(int, int last) const { return first_key <= last; }

    // Of the logits; else products stay as they are.
    __device__ __forceinline__ bool changes(const ScoreRule& rule) const { return masked || rule.transforms; }
    // Whether the rule asks for the rows' positions.
    __device__ __forceinline__ bool asks_positions(const ScoreRule& rule) const {
      return rule.slopes || rule.window > 0;
    }

    template <int m, int n>
    __device__ __forceinline__ void apply(const ScoreRule& rule, const QueryRows (&rows)[m], int first_column,
                                          float (&s)[m][n]) const {
      // Eight keys at a time, so that what is read of keys stays in registers no longer than that.
#pragma unroll
      for (int j = 0; j < n; j += 4) {
#pragma unroll
        for (int tile = 0; tile < m; ++tile) {
          auto& eight = reinterpret_cast<float(&)[4]>(s[tile][j]);
          apply_rule<false>(rule, rows[tile], first_key + first_column + 2 * j, eight);
          if (masked) mask_logits(rule, rows[tile], first_key + first_column + 2 * j, eight);
        }
      }
    }
  };

  __device__ __forceinline__ VisibleTiles(const PrefixAttentionForward& params, int first_query, int stop_query)
      : params_(params), first_query_(first_query), stop_query_(stop_query) {
    const int stop = stop_query < params.tokens ? stop_query : static_cast<int>(params.tokens);
    tiles_ = {0, (stop + keys - 1) / keys, 0, 0, false};
  }

  __device__ __forceinline__ bool advance() {
    const int index = tiles_.advance([&](int tile) {
      const int first = tile * keys;
      TokenBounds queries{};
      if (params_.window > 0) queries = token_bounds(params_, first_query_, stop_query_);
      // No key is seen by all of a tile of queries that reaches beyond the tokens.
      return visible_keys(token_bounds(params_, first, first + keys), first, first + keys, queries, first_query_,
                          stop_query_, params_.window);
    });
    tile_ = {index * keys, !tiles_.is_all};
    return index >= 0;
  }

  __device__ __forceinline__ Tile tile() const { return tile_; }

  // For copy_rows: where the keys' rows of a tensor lie, `stride` bytes apart.
  __device__ __forceinline__ auto sources(const unsigned char* data, uint32_t stride) const {
    const unsigned char* const first = data + uint64_t{static_cast<uint32_t>(tile_.first_key)} * stride;
    const int keys_left = static_cast<int>(params_.tokens) - tile_.first_key;
    return [=](int key) {
      return RowSource{first + uint64_t{static_cast<uint32_t>(key)} * stride, key < keys_left};
    };
  }

  // Whether some values of the tile may be seen by no query. They may be NaN, which not even a weight of 0 removes.
  __device__ __forceinline__ bool has_unseen() const { return tile_.masked; }
  template <class Sources>
  __device__ __forceinline__ auto without_unseen(Sources sources) const {
    return [this, sources](int key) {
      RowSource source = sources(key);
      const int row = tile_.first_key + key;
      source.exists = source.exists && __ldg(params_.subtree_end + row) > row;
      return source;
    };
  }

 private:
  const PrefixAttentionForward& params_;
  int first_query_, stop_query_;
  VisibleUnits tiles_;
  Tile tile_{};
};

template <class Sizes>
class ForwardTile {
  using T = typename Sizes::T;
  using Tiling = ForwardTiling<Sizes>;
  static constexpr int kKey = Sizes::kKey, kValue = Sizes::kValue;
  static constexpr int kKeys = Tiling::kKeys, kRowTiles = Tiling::kRowTiles, kThreads = Tiling::kThreads;
  static constexpr int kSteps = kKey / 16, kHeldSteps = Tiling::kHeldColumns / 16;

 public:
  __device__ __forceinline__ ForwardTile(const PrefixAttentionForward& params, const QueryTile& queries,
                                         unsigned char* shared)
      : params_(params),
        queries_(queries),
        shared_(shared),
        lane_(threadIdx.x % kWarpSize),
        first_row_(static_cast<int>(threadIdx.x) / kWarpSize * 16 * kRowTiles) {}

  template <class Tiles>
  __device__ __forceinline__ void run() {
    const ScoreRule rule(params_);
    Tiles tiles(params_, queries_.first, queries_.stop);
    bool more = tiles.advance();
    copy_queries();
    if (more) {
      copy_keys(tiles, 0);
      if constexpr (Tiling::kStages == 2) copy_values(tiles, 0);
    }
    wait_for_copies();
    if constexpr (kHeldSteps > 0) {
#pragma unroll
      for (int k = 0; k < kHeldSteps; ++k) {
        load_queries<Tiling::kHeldColumns>(Tiling::kStageBytes, k, held_queries_[k]);
      }
    }
    for (int stage = 0; more; stage ^= Tiling::kStages - 1) {
      const auto tile = tiles.tile();
      // Also: all threads are done with what is overwritten next.
      wait_for_copies();
      if constexpr (Tiling::kStages == 2) {
        more = tiles.advance();
        if (more) {
          copy_keys(tiles, stage ^ 1);
          copy_values(tiles, stage ^ 1);
        }
      } else {
        copy_values(tiles, 0);
      }
      const int first_row = ptx::forget_origin(first_row_), last_row = first_row + 16 * kRowTiles - 1;
      const bool concerned = tile.concerns(queries_.token(first_row), queries_.token(last_row));
      float s[kRowTiles][kKeys / 2] = {};
      if (concerned) multiply_keys(stage, s);
      if constexpr (Tiling::kStages == 1) {
        wait_for_copies();
        more = tiles.advance();
        if (more) copy_keys(tiles, 0);
      }
      if (concerned) {
        if (tile.changes(rule)) {
          // Anew for every tile: registers are scarcer than time.
          QueryRows rows[kRowTiles];
          describe_rows(tile.asks_positions(rule), rows);
          tile.apply(rule, rows, 2 * (lane_ % 4), s);
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          float rescale[2];
          if (softmax_[m].take(rule.factor, s[m], rescale)) {
#pragma unroll
            for (int j = 0; j < kValue / 2; ++j) out_[m][j] *= rescale[j / 2 % 2];
          }
        }
        multiply_values(stage, s);
      }
    }
    finish(rule.factor);
  }

 private:
  __device__ __forceinline__ unsigned char* keys(int stage) const { return shared_ + stage * Tiling::kStageBytes; }
  __device__ __forceinline__ unsigned char* values(int stage) const { return keys(stage) + Tiling::kKeyBytes; }

  // Of accumulators: row i of tile m of the thread, within the block's tile.
  __device__ __forceinline__ int row_of(int m, int i) const { return first_row_ + 16 * m + 8 * i + lane_ / 4; }

  __device__ __forceinline__ void describe_rows(bool with_positions, QueryRows (&rows)[kRowTiles]) const {
    const int first = ptx::forget_origin(row_of(0, 0));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first + 16 * m + 8 * i, token = queries_.token(row);
        const bool exists = token < params_.tokens;
        rows[m].token[i] = exists ? token : -1;
        rows[m].position[i] = exists && with_positions ? params_.position[token] : 0;
        rows[m].slope[i] = params_.alibi_slopes ? params_.alibi_slopes[queries_.head(row)] * kLog2E : 0.0f;
      }
    }
  }

  // --- from memory -----------------------------------------------------------------------------------------

  // All that this thread has asked for, and by the barrier all that its block has.
  __device__ __forceinline__ void wait_for_copies() const {
    ptx::cp_async_wait_all();
    __syncthreads();
  }

  template <int columns>
  __device__ __forceinline__ void copy_query_columns(int offset, int first_column) const {
    const T* const data = static_cast<const T*>(params_.q.data) + first_column;
    copy_rows<columns, Tiling::kRows, kThreads>(shared_ + offset, params_.key_size - first_column, [&](int row) {
      const int token = queries_.token(row);
      const T* const source = data + token * params_.q.token_stride + queries_.head(row) * params_.q.head_stride;
      return RowSource{reinterpret_cast<const unsigned char*>(source), token < params_.tokens};
    });
  }
  __device__ __forceinline__ void copy_queries() const {
    if constexpr (Tiling::kHeldColumns > 0) copy_query_columns<Tiling::kHeldColumns>(Tiling::kStageBytes, 0);
    if constexpr (Tiling::kReadColumns > 0) {
      copy_query_columns<Tiling::kReadColumns>(Tiling::kReadOffset, Tiling::kHeldColumns);
    }
  }

  template <class Tiles>
  __device__ __forceinline__ auto sources(const Tiles& tiles, const AttentionHeads& heads) const {
    const T* const data = static_cast<const T*>(heads.data) + ptx::forget_origin(queries_.key_head) * heads.head_stride;
    return tiles.sources(reinterpret_cast<const unsigned char*>(data),
                         static_cast<uint32_t>(heads.token_stride) * static_cast<uint32_t>(sizeof(T)));
  }
  template <class Tiles>
  __device__ __forceinline__ void copy_keys(const Tiles& tiles, int stage) const {
    copy_rows<kKey, kKeys, kThreads>(keys(stage), params_.key_size, sources(tiles, params_.k));
  }
  template <class Tiles>
  __device__ __forceinline__ void copy_values(const Tiles& tiles, int stage) const {
    const auto rows = sources(tiles, params_.v);
    if (tiles.has_unseen()) {
      copy_rows<kValue, kKeys, kThreads>(values(stage), params_.value_size, tiles.without_unseen(rows));
    } else {
      copy_rows<kValue, kKeys, kThreads>(values(stage), params_.value_size, rows);
    }
  }

  // --- products --------------------------------------------------------------------------------------------

  template <int columns>
  __device__ __forceinline__ void load_queries(int offset, int step, uint32_t (&fragments)[kRowTiles][4]) const {
    const auto address = lane_rows_first<columns>(lane_);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      ptx::ldmatrix<4>(fragments[m], address.at(shared_ + offset, first_row_ + 16 * m, step));
    }
  }

  __device__ __forceinline__ void multiply_keys(int stage, float (&s)[kRowTiles][kKeys / 2]) {
    const auto address = lane_columns_first<kKey>(ptx::forget_origin(lane_));
    const unsigned char* const tile = keys(stage);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t read[kRowTiles][4];
      if constexpr (Tiling::kReadColumns > 0) {
        if (k >= kHeldSteps) load_queries<Tiling::kReadColumns>(Tiling::kReadOffset, k - kHeldSteps, read);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t pair[4];
        ptx::ldmatrix<4>(pair, address.at(tile, 16 * n, k));
        const uint32_t low[2] = {pair[0], pair[1]}, high[2] = {pair[2], pair[3]};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const auto& queries = k < kHeldSteps ? held_queries_[k][m] : read[m];
          ptx::mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(s[m][8 * n]), queries, low);
          ptx::mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(s[m][8 * n + 4]), queries, high);
        }
      }
    }
  }

  // Accumulators of two neighbouring tiles of 8 keys are operand A for the 16 keys.
  __device__ __forceinline__ void multiply_values(int stage, const float (&s)[kRowTiles][kKeys / 2]) {
    const auto address = lane_rows_first<kValue>(ptx::forget_origin(lane_));
    const unsigned char* const tile = values(stage);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t weights[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          weights[m][c] = narrow_pair(s[m][8 * k + 2 * c], s[m][8 * k + 2 * c + 1], T{}).bits;
        }
      }
#pragma unroll
      for (int n = 0; n < kValue / 16; ++n) {
        uint32_t pair[4];
        ptx::ldmatrix<4, true>(pair, address.at(tile, 16 * k, n));
        const uint32_t low[2] = {pair[0], pair[1]}, high[2] = {pair[2], pair[3]};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(out_[m][8 * n]), weights[m], low);
          ptx::mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(out_[m][8 * n + 4]), weights[m], high);
        }
      }
    }
  }

  // --- results ---------------------------------------------------------------------------------------------

  __device__ __forceinline__ void finish(float factor) {
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      // No negative zero is left: whether a sum is one depends on tiles that the row doesn't see.
#pragma unroll
      for (int j = 0; j < kValue / 2; ++j) out_[m][j] += 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row_of(m, i), token = queries_.token(row), head = queries_.head(row);
        const bool exists = token < params_.tokens;
        const SoftmaxRow result = softmax_[m].finish(i, factor, params_.sinks ? params_.sinks + head : nullptr);
        const int64_t at = int64_t{token} * params_.query_heads + head;
        if (exists && lane_ % 4 == 0) params_.lse[at] = result.lse;
        T* const target = static_cast<T*>(params_.out) + at * params_.value_size;
        store_row<T>(exists ? target : nullptr, params_.value_size, out_[m], i, result);
        // Rows i of all tiles are of one head.
        largest[i] = larger(largest[i], softmax_[m].largest[i] * factor * kLn2);
      }
    }
    if (params_.max_logits) store_max_logits(params_.max_logits, queries_.first_head, 1 << queries_.head_bits, largest);
  }

  const PrefixAttentionForward& params_;
  const QueryTile& queries_;
  unsigned char* const shared_;
  const int lane_, first_row_;
  uint32_t held_queries_[kHeldSteps > 0 ? kHeldSteps : 1][kRowTiles][4];
  float out_[kRowTiles][kValue / 2] = {};
  OnlineSoftmax softmax_[kRowTiles];
};

template <class Sizes, bool along_paths>
__global__ void __launch_bounds__(ForwardTiling<Sizes>::kThreads, ForwardTiling<Sizes>::kBlocks)
    prefix_attention_forward_kernel(const PrefixAttentionForward params) {
  constexpr int kKeys = ForwardTiling<Sizes>::kKeys;
  PYKERN_DYNAMIC_SHARED(shared);
  const QueryTile queries(params, blockIdx.x);
  if (queries.first >= params.tokens) return;
  ForwardTile<Sizes> tile(params, queries, shared);
  tile.template run<std::conditional_t<along_paths, PathTiles<kKeys>, VisibleTiles<kKeys>>>();
}

}  // namespace pykern
