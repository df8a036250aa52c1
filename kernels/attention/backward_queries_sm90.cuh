// Gradients of queries on sm_90a.
//
// A block owns 128 rows of packed query heads, a consumer warpgroup 64 of them; the producer has those tiles of keys
// and values copied that one of the rows may see. The gradients of the logits are an operand in registers for the sum
// over keys as they come out.
#pragma once

#include "kernels/attention/backward_sm90.cuh"

namespace pykern {

constexpr int kRowsOfBlock = 64 * kConsumers;
static_assert(kRowsOfBlock == kOrderTokens, "a block of the order is as many tiles of queries as there are heads");

template <class Sizes>
struct QueriesTiling {
  static constexpr int kKey = Sizes::kKey, kValue = Sizes::kValue;
  static constexpr bool kLarge = kKey > 128 || kValue > 128;
  static constexpr int kKeys = kLarge ? 64 : 128;  // of a tile
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  // Values are needed for less long than keys, so that they do with fewer stages where memory is short.
  static constexpr int kKeyStages = kKey + kValue <= 128 ? 4 : 2, kValueStages = kValue > 128 ? 1 : kKeyStages;
  static constexpr int kQueryBytes = tile_bytes(kRowsOfBlock, kKey), kGradBytes = tile_bytes(kRowsOfBlock, kValue);
  static constexpr int kKeyBytes = tile_bytes(kKeys, kKey), kValueBytes = tile_bytes(kKeys, kValue);

  // What there is of a key beside its vectors; a column each.
  struct Columns {
    int32_t end[kKeys];       // 0 where there is no key
    int32_t position[kKeys];  // written only with a window or slopes
  };
  struct Shared {
    Ring<kKeyStages> keys;
    Ring<kValueStages> values;
    uint64_t resident;
    TileNote notes[kKeyStages];
    Columns columns[kKeyStages];
  };
  static constexpr int kTileBytes =
      kQueryBytes + kGradBytes + kKeyStages * kKeyBytes + kValueStages * kValueBytes;
  static constexpr int kSharedBytes = kTileBytes + static_cast<int>(sizeof(Shared));
  static_assert(kSharedBytes <= kSharedLimit, "a block has no more shared memory");
};

// Where a block works.
struct QueriesPlace {
  int first_head, first_token;

  __device__ __forceinline__ explicit QueriesPlace(const PrefixAttentionBackwardSm90& call) {
    const PrefixAttentionBackward& params = call.params;
    const int block = static_cast<int>(blockIdx.x), order = block / params.query_heads;
    // A block of the order is `heads` tiles for each set of packed heads.
    const int within = block - order * params.query_heads, tile = within & ((1 << call.heads_shift) - 1);
    first_head = within - tile;
    first_token = params.query_order[order] * kOrderTokens + tile * (kRowsOfBlock >> call.heads_shift);
  }
};

// One warp: finds the tiles of keys that one of the rows may see and has them copied.
template <class Sizes>
__device__ __forceinline__ void produce_keys(const PrefixAttentionBackwardSm90& call, const QueriesPlace& place,
                                             unsigned char* tiles, typename QueriesTiling<Sizes>::Shared& shared) {
  using Tiling = QueriesTiling<Sizes>;
  constexpr int kKeys = Tiling::kKeys;
  const PrefixAttentionBackward& params = call.params;
  const int lane = threadIdx.x % kWarpSize, tokens = static_cast<int>(params.tokens);
  if (lane == 0) {
    ptx::mbarrier_arrive_expect_tx(&shared.resident, Tiling::kQueryBytes + Tiling::kGradBytes);
    load_tile<kRowsOfBlock, Sizes::kKey>(tiles, call.q, place.first_head, place.first_token, call.heads_shift,
                                         &shared.resident);
    load_tile<kRowsOfBlock, Sizes::kValue>(tiles + Tiling::kQueryBytes, call.grad_out, place.first_head,
                                           place.first_token, call.heads_shift, &shared.resident);
  }

  const int key_head = place.first_head / call.group;
  const int own_tokens = 64 >> call.heads_shift;
  int first[kConsumers], stop[kConsumers], last = 0;
  TokenBounds queries[kConsumers];
#pragma unroll
  for (int w = 0; w < kConsumers; ++w) {
    first[w] = place.first_token + w * own_tokens;
    stop[w] = first[w] + own_tokens;
    if (first[w] >= tokens) continue;
    queries[w] = token_bounds(params, first[w], stop[w]);
    last = stop[w] < tokens ? stop[w] : tokens;
  }

  unsigned char* key_tiles = tiles + Tiling::kQueryBytes + Tiling::kGradBytes;
  unsigned char* value_tiles = key_tiles + Tiling::kKeyStages * Tiling::kKeyBytes;
  const bool positions = params.window > 0 || params.alibi_slopes != nullptr;
  int tile = 0;
  for (int base = 0; base < last; base += kWarpSize * kKeys) {
    // A lane looks at a tile.
    const int own = base + lane * kKeys;
    int visible[kConsumers];
    bool any = false, clears = false;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) visible[w] = static_cast<int>(Visible::none);
    if (own < last) {
      const TokenBounds keys = token_bounds(params, own, own + kKeys);
      clears = keys.least_end == 0;
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) {
        if (first[w] >= tokens) continue;
        const Visible seen = visible_keys(keys, own, own + kKeys, queries[w], first[w], stop[w], params.window);
        visible[w] = static_cast<int>(seen);
        any = any || seen != Visible::none;
      }
    }
    const unsigned clearing = __ballot_sync(kFullWarp, clears);
    for (unsigned left = __ballot_sync(kFullWarp, any); left; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      TileNote note{};
      note.first_token = base + source * kKeys;
      note.clears = (clearing >> source & 1u) != 0;
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) {
        note.visible[w] = static_cast<Visible>(__shfl_sync(kFullWarp, visible[w], source));
      }
      const auto copy_values = [&] {
        shared.values.wait_empty(tile);
        const int stage = shared.values.stage(tile);
        ptx::mbarrier_arrive_expect_tx(&shared.values.full[stage], Tiling::kValueBytes);
        load_tile<kKeys, Sizes::kValue>(value_tiles + stage * Tiling::kValueBytes, call.v, key_head, note.first_token,
                                        0, &shared.values.full[stage]);
      };
      // With as many stages that of the values is empty before that of the keys, and nobody waits for it.
      constexpr bool kTogether = Tiling::kValueStages == Tiling::kKeyStages;
      shared.keys.wait_empty(tile);
      const int stage = shared.keys.stage(tile);
      uint64_t* full = &shared.keys.full[stage];
      if (lane == 0) {
        ptx::mbarrier_expect_tx(full, Tiling::kKeyBytes);
        load_tile<kKeys, Sizes::kKey>(key_tiles + stage * Tiling::kKeyBytes, call.k, key_head, note.first_token, 0,
                                      full);
        if (kTogether) copy_values();
      }
      typename Tiling::Columns& columns = shared.columns[stage];
#pragma unroll
      for (int i = 0; i < kKeys / kWarpSize; ++i) {
        const int column = lane + kWarpSize * i, key = note.first_token + column;
        columns.end[column] = key < tokens ? __ldg(params.subtree_end + key) : 0;
        if (positions) columns.position[column] = key < tokens ? __ldg(params.position + key) : 0;
      }
      __syncwarp();
      if (lane == 0) {
        shared.notes[stage] = note;
        ptx::mbarrier_arrive(full);
        if (!kTogether) copy_values();
      }
      ++tile;
    }
  }
  shared.keys.wait_empty(tile);
  if (lane == 0) {
    const int stage = shared.keys.stage(tile);
    shared.notes[stage].last = true;
    ptx::mbarrier_arrive(&shared.keys.full[stage]);
  }
}

// A warpgroup: the gradients of its 64 rows.
template <class Sizes>
__device__ __forceinline__ void consume_keys(const PrefixAttentionBackwardSm90& call, const QueriesPlace& place,
                                             unsigned char* tiles, typename QueriesTiling<Sizes>::Shared& shared,
                                             int group) {
  using Tiling = QueriesTiling<Sizes>;
  using T = typename Sizes::T;
  constexpr int kKeys = Tiling::kKeys, kOwnBytes = 64 * kPanelRowBytes;
  const PrefixAttentionBackward& params = call.params;
  const ScoreRule rule(params);
  const int thread = threadIdx.x % 128, lane = thread % kWarpSize, tokens = static_cast<int>(params.tokens);
  const int first_column = lane % 4 * 2;

  QueryRows rows{};
  float lse[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 64 * group + thread / kWarpSize * 16 + lane / 4 + 8 * i;
    const int token = place.first_token + (row >> call.heads_shift);
    const int head = place.first_head + (row & ((1 << call.heads_shift) - 1));
    const bool exists = token < tokens;
    const int64_t index = int64_t{token} * params.query_heads + head;
    lse[i] = exists ? __ldg(params.lse + index) * kLog2E : -INFINITY;
    if (lse[i] == -INFINITY) lse[i] = INFINITY;
    delta[i] = lse[i] != INFINITY ? __ldg(params.delta + index) : 0.0f;
    rows.token[i] = exists ? token : -1;
    if (params.window > 0 || rule.slopes) rows.position[i] = exists ? __ldg(params.position + token) : 0;
    if (rule.slopes) rows.slope[i] = __ldg(params.alibi_slopes + head) * kLog2E;
  }

  float grad_q[Sizes::kKey / 2], s[kKeys / 2], grad_p[kKeys / 2];
#pragma unroll
  for (int i = 0; i < Sizes::kKey / 2; ++i) grad_q[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) s[i] = grad_p[i] = 0.0f;

  unsigned char* query_tile = tiles + group * kOwnBytes;
  unsigned char* key_tiles = tiles + Tiling::kQueryBytes + Tiling::kGradBytes;
  unsigned char* value_tiles = key_tiles + Tiling::kKeyStages * Tiling::kKeyBytes;
  const uint64_t query_rows = rows_of(query_tile), grad_rows = rows_of(query_tile + Tiling::kQueryBytes);
  ptx::mbarrier_wait(&shared.resident, 0);
  for (int tile = 0;; ++tile) {
    shared.keys.wait_full(tile);
    const TileNote& note = shared.notes[shared.keys.stage(tile)];
    if (note.last) break;
    const typename Tiling::Columns& columns = shared.columns[shared.keys.stage(tile)];
    unsigned char* keys = key_tiles + shared.keys.stage(tile) * Tiling::kKeyBytes;
    unsigned char* values = value_tiles + shared.values.stage(tile) * Tiling::kValueBytes;
    // Not between the two products: a wait there would have the compiler serialise them.
    shared.values.wait_full(tile);
    if (note.clears) {
      const auto unseen = [&](int row) { return columns.end[row] <= note.first_token + row; };
      clear_rows<kKeys, Sizes::kKey>(keys, 128 * group + thread, 128 * kConsumers, unseen);
      clear_rows<kKeys, Sizes::kValue>(values, 128 * group + thread, 128 * kConsumers, unseen);
      ptx::fence_proxy_async();
      ptx::barrier_sync(1, 128 * kConsumers);
    }
    const Visible visible = note.visible[group];
    if (visible == Visible::none) {
      shared.values.release(tile);
    } else {
      ptx::keep_in_place(s);
      ptx::keep_in_place(grad_p);
      ptx::wgmma_fence();
      multiply_rows<T, kRowsOfBlock, kKeys, Sizes::kKey>(s, query_rows, rows_of(keys));
      ptx::wgmma_commit();
      multiply_rows<T, kRowsOfBlock, kKeys, Sizes::kValue>(grad_p, grad_rows, rows_of(values));
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::keep_in_place(s);

      const auto position_of = [&](int column) { return columns.position[first_column + column]; };
      transform_products(rule, rows, position_of, s);
      if (visible == Visible::some) {
#pragma unroll
        for (int j = 0; j < kKeys / 2; ++j) {
          const int column = j / 4 * 8 + j % 2, key = note.first_token + first_column + column;
          const int32_t token = rows.token[j / 2 % 2];
          if ((key > token) | (token >= columns.end[first_column + column])) s[j] = -INFINITY;
        }
        if (params.window > 0) {
#pragma unroll
          for (int j = 0; j < kKeys / 2; ++j) {
            const int32_t distance = rows.position[j / 2 % 2] - position_of(j / 4 * 8 + j % 2);
            if (distance >= params.window) s[j] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] = fast_exp2(s[i] * rule.factor - lse[i / 2 % 2]);
      ptx::wgmma_wait<0>();
      ptx::keep_in_place(grad_p);
      shared.values.release(tile);

      if (rule.softcap_log2 > 0.0f) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int32_t position = rule.slopes ? position_of(8 * j + c) : 0;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int at_score = 4 * j + 2 * i + c;
              const float weight = s[at_score];
              const float distance =
                  rule.slopes ? rows.slope[i] * static_cast<float>(rows.position[i] - position) : 0.0f;
              s[at_score] = weight * (grad_p[at_score] - delta[i]) * softcap_derivative(rule, weight, lse[i], distance);
            }
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) s[i] *= grad_p[i] - delta[i / 2 % 2];
      }
      uint32_t grad_s[kKeys / 16][4];
      as_operand<T>(s, grad_s);
      keep_in_place(grad_s);
      ptx::keep_in_place(grad_q);
      ptx::wgmma_fence();
      accumulate_columns<T>(grad_q, grad_s, columns_of(keys, kKeys));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::keep_in_place(grad_q);
    }
    shared.keys.release(tile);
  }

  // Compared anew: the compiler would keep what it found out before the loop, at the cost of registers within.
  ptx::keep_in_place(lse);
  const bool sees[2] = {lse[0] != INFINITY, lse[1] != INFINITY};
  // Nobody else reads this warpgroup's queries, so their memory takes the gradients.
  write_tile<T, kRowsOfBlock, Sizes::kKey>(query_tile, grad_q, params.scale, sees);
  ptx::fence_proxy_async();
  ptx::barrier_sync(2 + group, 128);
  if (thread == 0) {
    const int first = place.first_token + ((64 * group) >> call.heads_shift);
    store_tile<kRowsOfBlock, Sizes::kKey>(call.grad_q, place.first_head, first, query_tile);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// A block for each tile of rows, longest first, as the kernel for keys has it.
template <class Sizes>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    prefix_attention_backward_queries_sm90_kernel(const __grid_constant__ PrefixAttentionBackwardSm90 call) {
  using Tiling = QueriesTiling<Sizes>;
  PYKERN_DYNAMIC_SHARED(tiles);
  auto& shared = *reinterpret_cast<typename Tiling::Shared*>(tiles + Tiling::kTileBytes);
  const QueriesPlace place(call);
  // The last block of the order may have no tokens for all of its tiles.
  if (place.first_token >= call.params.tokens) return;
  if (threadIdx.x == 0) {
    shared.keys.init();
    shared.values.init();
    ptx::mbarrier_init(&shared.resident, 1);
    ptx::fence_mbarrier_init();
  }
  if (threadIdx.x == kWarpSize) prefetch_maps(call);
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::decrease_registers<Tiling::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) produce_keys<Sizes>(call, place, tiles, shared);
  } else {
    ptx::increase_registers<Tiling::kConsumerRegisters>();
    consume_keys<Sizes>(call, place, tiles, shared, warpgroup - 1);
  }
}

}  // namespace pykern
