// Gradients of keys and values on sm_90a.
//
// A block owns a tile of keys of one key head. Queries that see a key are one contiguous range; the producer has tiles
// of them copied, for all query heads of the key head one after the other, so that both gradients are summed in float32
// in registers, in one order. The products are transposed: rows are keys, columns are queries. Then weights and their
// gradients are operands in registers for the sums over queries as they come out.
//
// Where registers hold both gradients of 64 keys, each consumer warpgroup has 64 keys of its own. Wide heads have one
// tile of 64 keys: the first warpgroup makes the weights and the gradient of values, and hands the weights to the
// second, which makes that of keys. Each has two of the four products either way.
//
// Where a few tiles of keys hold most of the work, several blocks share each: key_shares_sm90.cuh.
#pragma once

#include "kernels/attention/key_shares_sm90.cuh"
#include "kernels/attention/scores_transposed.cuh"

namespace pykern {

// Where a block works.
struct KeysPlace {
  int key_head, first_key;
  int rank;           // of the block of the order
  int share, shares;  // of the tile's queries

  // Blocks of a tile that may be shared out come one after the other; those without a share have nothing to do.
  __device__ __forceinline__ KeysPlace(const PrefixAttentionBackwardSm90& call, int tiles, int keys) {
    const PrefixAttentionBackward& params = call.params;
    int block = static_cast<int>(blockIdx.x);
    const int shared = call.shared_blocks * tiles * params.key_heads * kKeyShares;
    const bool may_be_shared = block < shared;
    if (!may_be_shared) block += shared / kKeyShares - shared;
    share = may_be_shared ? block % kKeyShares : 0;
    if (may_be_shared) block /= kKeyShares;
    const int tile = block / params.key_heads;
    key_head = block - tile * params.key_heads;
    rank = tile / tiles;
    shares = may_be_shared ? shares_of(call, rank) : 1;
    first_key = params.key_order[rank] * kOrderTokens + tile % tiles * keys;
  }
};

template <class Sizes>
struct KeysTiling {
  static constexpr int kKey = Sizes::kKey, kValue = Sizes::kValue;
  static constexpr bool kWide = kKey + kValue > 256;
  static constexpr int kGroups = kWide ? 1 : kConsumers;  // of 64 keys
  static constexpr int kKeys = 64 * kGroups;
  static constexpr int kRows = 64;  // queries of a tile
  static constexpr int kStages = kKey + kValue > 320 ? 2 : 4;
  // Whether the sum for values goes on while the gradients of the logits are computed; else it would cost registers
  // that there are not, and the compiler would serialise all products.
  static constexpr int kLeftOver = kKey + kValue <= 192 ? 1 : 0;
  static constexpr int kKeyBytes = tile_bytes(kKeys, kKey), kValueBytes = tile_bytes(kKeys, kValue);
  static constexpr int kQueryBytes = tile_bytes(kRows, kKey), kGradBytes = tile_bytes(kRows, kValue);
  static constexpr int kStageBytes = kQueryBytes + kGradBytes;

  struct alignas(8) Two {
    float values[2];
  };
  // What there is of a query beside its vectors; a column each.
  struct Columns {
    Two lse[kRows / 2];    // in log2; inf where the query sees nothing or isn't one
    Two delta[kRows / 2];  // 0 there
    int32_t token[kRows], position[kRows];
    float slope[kRows];  // in log2
  };
  struct Shared {
    Ring<kStages> ring;
    uint64_t resident;
    KeysPlace place;
    uint64_t given, taken;  // weights, by the first warpgroup and by the second
    TileNote notes[kStages];
    alignas(16) Columns columns[kStages];
  };
  // Weights on their way from one warpgroup to the other: those of a thread, four by four.
  static constexpr int kWeightBytes = kWide ? 64 * kRows * 4 : 0;
  static constexpr int kTileBytes = kKeyBytes + kValueBytes + kStages * kStageBytes + kWeightBytes;
  static constexpr int kSharedBytes = kTileBytes + static_cast<int>(sizeof(Shared));
  static_assert(kSharedBytes <= kSharedLimit, "a block has no more shared memory");
};

// One warp: finds the tiles of queries that see one of the block's keys, has them copied and describes them.
template <class Sizes>
__device__ __forceinline__ void produce_queries(const PrefixAttentionBackwardSm90& call, const KeysPlace& place,
                                                unsigned char* tiles, typename KeysTiling<Sizes>::Shared& shared) {
  using Tiling = KeysTiling<Sizes>;
  constexpr int kRows = Tiling::kRows;
  const PrefixAttentionBackward& params = call.params;
  const int lane = threadIdx.x % kWarpSize, tokens = static_cast<int>(params.tokens);
  if (lane == 0) {
    ptx::mbarrier_arrive_expect_tx(&shared.resident, Tiling::kKeyBytes + Tiling::kValueBytes);
    load_tile<Tiling::kKeys, Sizes::kKey>(tiles, call.k, place.key_head, place.first_key, 0, &shared.resident);
    load_tile<Tiling::kKeys, Sizes::kValue>(tiles + Tiling::kKeyBytes, call.v, place.key_head, place.first_key, 0,
                                           &shared.resident);
  }

  TokenBounds keys[Tiling::kGroups];
  int stop = 0;
#pragma unroll
  for (int w = 0; w < Tiling::kGroups; ++w) {
    const int first = place.first_key + 64 * w;
    keys[w] = first < tokens ? token_bounds(params, first, first + 64) : TokenBounds{};
    stop = keys[w].last_end > stop ? keys[w].last_end : stop;
  }

  const bool positions = params.window > 0 || params.alibi_slopes != nullptr;
  const int tile_tokens = kRows >> call.heads_shift;
  int tile = 0;
  // The tile's queries, in runs of whole units of 64 for those who share it.
  const int units = (stop - place.first_key + 64 * place.shares - 1) / (64 * place.shares);
  const int begin = place.first_key + 64 * units * place.share;
  stop = stop < begin + 64 * units ? stop : begin + 64 * units;
  const int stop_head = (place.key_head + 1) * call.group;
  for (int first_head = stop_head - call.group; first_head < stop_head; first_head += 1 << call.heads_shift) {
    for (int base = begin; base < stop; base += kWarpSize * tile_tokens) {
      // A lane looks at a tile.
      const int own = base + lane * tile_tokens;
      int visible[Tiling::kGroups];
      bool any = false;
#pragma unroll
      for (int w = 0; w < Tiling::kGroups; ++w) visible[w] = static_cast<int>(Visible::none);
      if (own < stop) {
        const TokenBounds queries = token_bounds(params, own, own + tile_tokens);
#pragma unroll
        for (int w = 0; w < Tiling::kGroups; ++w) {
          const int first = place.first_key + 64 * w;
          const Visible seen =
              visible_keys(keys[w], first, first + 64, queries, own, own + tile_tokens, params.window);
          visible[w] = static_cast<int>(seen);
          any = any || seen != Visible::none;
        }
      }
      for (unsigned left = __ballot_sync(kFullWarp, any); left; left &= left - 1) {
        const int source = __ffs(static_cast<int>(left)) - 1;
        TileNote note{};
        note.first_token = base + source * tile_tokens;
#pragma unroll
        for (int w = 0; w < Tiling::kGroups; ++w) {
          note.visible[w] = static_cast<Visible>(__shfl_sync(kFullWarp, visible[w], source));
        }
        float lse[kRows / kWarpSize], delta[kRows / kWarpSize], slope[kRows / kWarpSize];
        int32_t position[kRows / kWarpSize];
        bool clears = false;
#pragma unroll
        for (int i = 0; i < kRows / kWarpSize; ++i) {
          const int row = lane + kWarpSize * i, token = note.first_token + (row >> call.heads_shift);
          const int head = first_head + (row & ((1 << call.heads_shift) - 1));
          const bool exists = token < tokens;
          const int64_t index = int64_t{token} * params.query_heads + head;
          lse[i] = exists ? __ldg(params.lse + index) * kLog2E : INFINITY;
          delta[i] = exists ? __ldg(params.delta + index) : 0.0f;
          position[i] = positions && exists ? __ldg(params.position + token) : 0;
          slope[i] = params.alibi_slopes ? __ldg(params.alibi_slopes + head) * kLog2E : 0.0f;
          if (lse[i] == -INFINITY) {
            clears = true;
            lse[i] = INFINITY;
            delta[i] = 0.0f;
          }
        }
        note.clears = __any_sync(kFullWarp, clears);

        shared.ring.wait_empty(tile);
        const int at = shared.ring.stage(tile);
        typename Tiling::Columns& columns = shared.columns[at];
#pragma unroll
        for (int i = 0; i < kRows / kWarpSize; ++i) {
          const int row = lane + kWarpSize * i;
          columns.lse[row / 2].values[row % 2] = lse[i];
          columns.delta[row / 2].values[row % 2] = delta[i];
          columns.token[row] = note.first_token + (row >> call.heads_shift);
          if (positions) columns.position[row] = position[i];
          if (params.alibi_slopes) columns.slope[row] = slope[i];
        }
        __syncwarp();
        if (lane == 0) {
          shared.notes[at] = note;
          uint64_t* full = &shared.ring.full[at];
          unsigned char* stage = tiles + Tiling::kKeyBytes + Tiling::kValueBytes + at * Tiling::kStageBytes;
          ptx::mbarrier_arrive_expect_tx(full, Tiling::kStageBytes);
          load_tile<kRows, Sizes::kKey>(stage, call.q, first_head, note.first_token, call.heads_shift, full);
          load_tile<kRows, Sizes::kValue>(stage + Tiling::kQueryBytes, call.grad_out, first_head, note.first_token,
                                          call.heads_shift, full);
        }
        ++tile;
      }
    }
  }
  shared.ring.wait_empty(tile);
  if (lane == 0) {
    shared.notes[shared.ring.stage(tile)].last = true;
    ptx::mbarrier_arrive(&shared.ring.full[shared.ring.stage(tile)]);
  }
}

// Products of keys and queries become weights.
template <class Tiling>
__device__ __forceinline__ void to_weights(const ScoreRule& rule, const KeyRows& keys,
                                           const typename Tiling::Columns& columns, int first_column, bool masked,
                                           float (&s)[Tiling::kRows / 2]) {
  apply_rule(rule, keys, QueryColumns{columns.token, columns.position, columns.slope}, first_column, masked, s);
#pragma unroll
  for (int j = 0; j < Tiling::kRows / 8; ++j) {
    const typename Tiling::Two lse = columns.lse[first_column / 2 + 4 * j];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[4 * j + i] = fast_exp2(s[4 * j + i] * rule.factor - lse.values[i % 2]);
  }
}

// Weights s, by the gradients of the weights, become gradients of the products, up to the scale.
template <class Tiling>
__device__ __forceinline__ void to_gradients(const ScoreRule& rule, const KeyRows& keys,
                                             const typename Tiling::Columns& columns, int first_column,
                                             const float (&grad_p)[Tiling::kRows / 2],
                                             float (&s)[Tiling::kRows / 2]) {
  if (rule.softcap_log2 > 0.0f) {
#pragma unroll
    for (int j = 0; j < Tiling::kRows / 8; ++j) {
      const typename Tiling::Two lse = columns.lse[first_column / 2 + 4 * j];
      const typename Tiling::Two delta = columns.delta[first_column / 2 + 4 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = first_column + 8 * j + i % 2;
        float& score = s[4 * j + i];
        float distance = 0.0f;
        if (rule.slopes) {
          distance = columns.slope[column] * static_cast<float>(columns.position[column] - keys.position[i / 2]);
        }
        const float derivative = softcap_derivative(rule, score, lse.values[i % 2], distance);
        score *= (grad_p[4 * j + i] - delta.values[i % 2]) * derivative;
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < Tiling::kRows / 8; ++j) {
      const typename Tiling::Two delta = columns.delta[first_column / 2 + 4 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) s[4 * j + i] *= grad_p[4 * j + i] - delta.values[i % 2];
    }
  }
}

// Zeros in a tile's queries that see nothing, before a product reads them. By all consumers.
template <class Tiling>
__device__ __forceinline__ void clear_queries(unsigned char* queries, unsigned char* grads,
                                              const typename Tiling::Columns& columns) {
  constexpr int kThreads = 128 * kConsumers;
  const int thread = static_cast<int>(threadIdx.x) - 128;
  const auto sees_nothing = [&](int row) { return columns.lse[row / 2].values[row % 2] == INFINITY; };
  clear_rows<Tiling::kRows, Tiling::kKey>(queries, thread, kThreads, sees_nothing);
  clear_rows<Tiling::kRows, Tiling::kValue>(grads, thread, kThreads, sees_nothing);
  ptx::fence_proxy_async();
  ptx::barrier_sync(1, kThreads);
}

// Calls body(note, columns, queries, grads) for the tiles of queries as they arrive. By all consumers.
template <class Tiling, class Body>
__device__ __forceinline__ void each_tile(unsigned char* tiles, typename Tiling::Shared& shared, const Body& body) {
  for (int tile = 0;; ++tile) {
    shared.ring.wait_full(tile);
    const int at = shared.ring.stage(tile);
    const TileNote& note = shared.notes[at];
    if (note.last) return;
    const typename Tiling::Columns& columns = shared.columns[at];
    unsigned char* queries = tiles + Tiling::kKeyBytes + Tiling::kValueBytes + at * Tiling::kStageBytes;
    unsigned char* grads = queries + Tiling::kQueryBytes;
    if (note.clears) clear_queries<Tiling>(queries, grads, columns);
    body(note, columns, queries, grads);
    shared.ring.release(tile);
  }
}

// A thread's two of 64 keys, and whether anybody sees them.
__device__ __forceinline__ KeyRows key_rows(const PrefixAttentionBackward& params, int first_key, bool (&seen)[2]) {
  const bool positions = params.window > 0 || params.alibi_slopes != nullptr;
  const int thread = threadIdx.x % 128;
  KeyRows keys{};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = first_key + thread / kWarpSize * 16 + thread % kWarpSize / 4 + 8 * i;
    keys.token[i] = key;
    keys.end[i] = key < params.tokens ? __ldg(params.subtree_end + key) : 0;
    keys.position[i] = positions && key < params.tokens ? __ldg(params.position + key) : 0;
    seen[i] = keys.end[i] > key;
  }
  return keys;
}

// A warpgroup: the gradients of its 64 keys and values.
template <class Sizes>
__device__ __forceinline__ void consume_queries(const PrefixAttentionBackwardSm90& call, const KeysPlace& place,
                                                unsigned char* tiles, typename KeysTiling<Sizes>::Shared& shared,
                                                int group) {
  using Tiling = KeysTiling<Sizes>;
  using T = typename Sizes::T;
  constexpr int kRows = Tiling::kRows, kOwnBytes = 64 * kPanelRowBytes;
  const PrefixAttentionBackward& params = call.params;
  const ScoreRule rule(params);
  const int thread = threadIdx.x % 128, first_column = thread % 4 * 2;
  bool seen[2];
  const KeyRows keys = key_rows(params, place.first_key + 64 * group, seen);

  float grad_k[Sizes::kKey / 2], grad_v[Sizes::kValue / 2], s[kRows / 2], grad_p[kRows / 2];
#pragma unroll
  for (int i = 0; i < Sizes::kKey / 2; ++i) grad_k[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < Sizes::kValue / 2; ++i) grad_v[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) s[i] = grad_p[i] = 0.0f;

  unsigned char* key_tile = tiles + group * kOwnBytes;
  unsigned char* value_tile = tiles + Tiling::kKeyBytes + group * kOwnBytes;
  const uint64_t key_operand = rows_of(key_tile), value_operand = rows_of(value_tile);
  ptx::mbarrier_wait(&shared.resident, 0);
  each_tile<Tiling>(tiles, shared, [&](const TileNote& note, const auto& columns, unsigned char* queries,
                                       unsigned char* grads) {
    const Visible visible = note.visible[group];
    if (visible != Visible::none) {
      ptx::keep_in_place(s);
      ptx::keep_in_place(grad_p);
      ptx::wgmma_fence();
      multiply_rows<T, Tiling::kKeys, kRows, Sizes::kKey>(s, key_operand, rows_of(queries));
      ptx::wgmma_commit();
      multiply_rows<T, Tiling::kKeys, kRows, Sizes::kValue>(grad_p, value_operand, rows_of(grads));
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::keep_in_place(s);

      to_weights<Tiling>(rule, keys, columns, first_column, visible == Visible::some, s);
      uint32_t weights[kRows / 16][4];
      as_operand<T>(s, weights);
      keep_in_place(weights);
      ptx::keep_in_place(grad_v);
      ptx::wgmma_fence();
      accumulate_columns<T>(grad_v, weights, columns_of(grads, kRows));
      ptx::wgmma_commit();
      ptx::wgmma_wait<Tiling::kLeftOver>();
      ptx::keep_in_place(grad_p);

      to_gradients<Tiling>(rule, keys, columns, first_column, grad_p, s);
      uint32_t grad_s[kRows / 16][4];
      as_operand<T>(s, grad_s);
      keep_in_place(grad_s);
      ptx::keep_in_place(grad_k);
      ptx::wgmma_fence();
      accumulate_columns<T>(grad_k, grad_s, columns_of(queries, kRows));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep_in_place(grad_v);
      ptx::keep_in_place(grad_k);
    }
  });

  if (place.shares > 1) {
    const int row = place.first_key % kOrderTokens + 64 * group, pitch = params.key_size + params.value_size;
    float* rows = row_of_share(params, place.rank, place.key_head, place.share, row);
    store_share<Sizes::kKey>(rows, pitch, params.key_size, grad_k);
    store_share<Sizes::kValue>(rows + params.key_size, pitch, params.value_size, grad_v);
    return;
  }
  // Nobody else reads this warpgroup's keys and values, so their memory takes the gradients.
  write_tile<T, Tiling::kKeys, Sizes::kKey>(key_tile, grad_k, params.scale, seen);
  write_tile<T, Tiling::kKeys, Sizes::kValue>(value_tile, grad_v, 1.0f, seen);
  ptx::fence_proxy_async();
  ptx::barrier_sync(2 + group, 128);
  if (thread == 0) {
    const int first = place.first_key + 64 * group;
    store_tile<Tiling::kKeys, Sizes::kKey>(call.grad_k, place.key_head, first, key_tile);
    store_tile<Tiling::kKeys, Sizes::kValue>(call.grad_v, place.key_head, first, value_tile);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// The first warpgroup of wide heads: weights, and the gradient of the values.
template <class Sizes>
__device__ __forceinline__ void consume_for_values(const PrefixAttentionBackwardSm90& call, const KeysPlace& place,
                                                   unsigned char* tiles, typename KeysTiling<Sizes>::Shared& shared) {
  using Tiling = KeysTiling<Sizes>;
  using T = typename Sizes::T;
  constexpr int kRows = Tiling::kRows;
  const PrefixAttentionBackward& params = call.params;
  const ScoreRule rule(params);
  const int thread = threadIdx.x % 128, first_column = thread % 4 * 2;
  bool seen[2];
  const KeyRows keys = key_rows(params, place.first_key, seen);
  float grad_v[Sizes::kValue / 2], s[kRows / 2];
#pragma unroll
  for (int i = 0; i < Sizes::kValue / 2; ++i) grad_v[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) s[i] = 0.0f;

  unsigned char* value_tile = tiles + Tiling::kKeyBytes;
  auto* handed = reinterpret_cast<Pack<float>*>(tiles + Tiling::kTileBytes - Tiling::kWeightBytes) + thread;
  const uint64_t key_operand = rows_of(tiles);
  ptx::mbarrier_wait(&shared.resident, 0);
  uint32_t turn = 0;
  each_tile<Tiling>(tiles, shared, [&](const TileNote& note, const auto& columns, unsigned char* queries,
                                       unsigned char* grads) {
    ptx::keep_in_place(s);
    ptx::wgmma_fence();
    multiply_rows<T, Tiling::kKeys, kRows, Sizes::kKey>(s, key_operand, rows_of(queries));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::keep_in_place(s);
    to_weights<Tiling>(rule, keys, columns, first_column, note.visible[0] == Visible::some, s);

    uint32_t weights[kRows / 16][4];
    as_operand<T>(s, weights);
    keep_in_place(weights);
    ptx::keep_in_place(grad_v);
    ptx::wgmma_fence();
    accumulate_columns<T>(grad_v, weights, columns_of(grads, kRows));
    ptx::wgmma_commit();

    ptx::mbarrier_wait(&shared.taken, turn ^ 1u);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) handed[128 * i] = {s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]};
    __syncwarp();
    if (thread % kWarpSize == 0) ptx::mbarrier_arrive(&shared.given);
    turn ^= 1u;
    ptx::wgmma_wait<0>();
    ptx::keep_in_place(grad_v);
  });

  if (place.shares > 1) {
    const int row = place.first_key % kOrderTokens, pitch = params.key_size + params.value_size;
    float* rows = row_of_share(params, place.rank, place.key_head, place.share, row);
    store_share<Sizes::kValue>(rows + params.key_size, pitch, params.value_size, grad_v);
    return;
  }
  // The second warpgroup reads the values' memory until then, and writes that of the keys after.
  ptx::barrier_sync(1, 128 * kConsumers);
  write_tile<T, Tiling::kKeys, Sizes::kValue>(value_tile, grad_v, 1.0f, seen);
  ptx::fence_proxy_async();
  ptx::barrier_sync(2, 128);
  if (thread == 0) {
    store_tile<Tiling::kKeys, Sizes::kValue>(call.grad_v, place.key_head, place.first_key, value_tile);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// The second: the gradient of the keys.
template <class Sizes>
__device__ __forceinline__ void consume_for_keys(const PrefixAttentionBackwardSm90& call, const KeysPlace& place,
                                                 unsigned char* tiles, typename KeysTiling<Sizes>::Shared& shared) {
  using Tiling = KeysTiling<Sizes>;
  using T = typename Sizes::T;
  constexpr int kRows = Tiling::kRows;
  const PrefixAttentionBackward& params = call.params;
  const ScoreRule rule(params);
  const int thread = threadIdx.x % 128, first_column = thread % 4 * 2;
  bool seen[2];
  const KeyRows keys = key_rows(params, place.first_key, seen);
  float grad_k[Sizes::kKey / 2], s[kRows / 2], grad_p[kRows / 2];
#pragma unroll
  for (int i = 0; i < Sizes::kKey / 2; ++i) grad_k[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) grad_p[i] = 0.0f;

  const auto* handed = reinterpret_cast<Pack<float>*>(tiles + Tiling::kTileBytes - Tiling::kWeightBytes) + thread;
  const uint64_t value_operand = rows_of(tiles + Tiling::kKeyBytes);
  ptx::mbarrier_wait(&shared.resident, 0);
  uint32_t turn = 0;
  each_tile<Tiling>(tiles, shared, [&](const TileNote&, const auto& columns, unsigned char* queries,
                                       unsigned char* grads) {
    ptx::keep_in_place(grad_p);
    ptx::wgmma_fence();
    multiply_rows<T, Tiling::kKeys, kRows, Sizes::kValue>(grad_p, value_operand, rows_of(grads));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::keep_in_place(grad_p);

    ptx::mbarrier_wait(&shared.given, turn);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const Pack<float> pack = handed[128 * i];
#pragma unroll
      for (int j = 0; j < 4; ++j) s[4 * i + j] = pack[j];
    }
    __syncwarp();
    if (thread % kWarpSize == 0) ptx::mbarrier_arrive(&shared.taken);
    turn ^= 1u;
    to_gradients<Tiling>(rule, keys, columns, first_column, grad_p, s);

    uint32_t grad_s[kRows / 16][4];
    as_operand<T>(s, grad_s);
    keep_in_place(grad_s);
    ptx::keep_in_place(grad_k);
    ptx::wgmma_fence();
    accumulate_columns<T>(grad_k, grad_s, columns_of(queries, kRows));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::keep_in_place(grad_k);
  });

  if (place.shares > 1) {
    const int row = place.first_key % kOrderTokens, pitch = params.key_size + params.value_size;
    float* rows = row_of_share(params, place.rank, place.key_head, place.share, row);
    store_share<Sizes::kKey>(rows, pitch, params.key_size, grad_k);
    return;
  }
  ptx::barrier_sync(1, 128 * kConsumers);
  write_tile<T, Tiling::kKeys, Sizes::kKey>(tiles, grad_k, params.scale, seen);
  ptx::fence_proxy_async();
  ptx::barrier_sync(3, 128);
  if (thread == 0) {
    store_tile<Tiling::kKeys, Sizes::kKey>(call.grad_k, place.key_head, place.first_key, tiles);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// A block for each key head and tile of keys, or share of it, longest first: the hardware hands the next to the first
// multiprocessor that is free, which balances tiles of very different length better than a persistent grid with fixed
// turns, and needs no counter.
template <class Sizes>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    prefix_attention_backward_keys_sm90_kernel(const __grid_constant__ PrefixAttentionBackwardSm90 call) {
  using Tiling = KeysTiling<Sizes>;
  PYKERN_DYNAMIC_SHARED(tiles);
  auto& shared = *reinterpret_cast<typename Tiling::Shared*>(tiles + Tiling::kTileBytes);
  if (threadIdx.x == 0) {
    shared.ring.init();
    ptx::mbarrier_init(&shared.resident, 1);
    ptx::mbarrier_init(&shared.given, 4);
    ptx::mbarrier_init(&shared.taken, 4);
    ptx::fence_mbarrier_init();
    shared.place = KeysPlace(call, kOrderTokens / Tiling::kKeys, Tiling::kKeys);
  }
  if (threadIdx.x == kWarpSize) prefetch_maps(call);
  __syncthreads();
  const KeysPlace& place = shared.place;
  if (place.share >= place.shares) return;
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::decrease_registers<40>();
    if (threadIdx.x < kWarpSize) produce_queries<Sizes>(call, place, tiles, shared);
  } else {
    ptx::increase_registers<232>();
    if constexpr (!Tiling::kWide) {
      consume_queries<Sizes>(call, place, tiles, shared, warpgroup - 1);
    } else if (warpgroup == 1) {
      consume_for_values<Sizes>(call, place, tiles, shared);
    } else {
      consume_for_keys<Sizes>(call, place, tiles, shared);
    }
  }
}

}  // namespace pykern
