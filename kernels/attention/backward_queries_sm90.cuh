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
  // Values are needed for less long than keys, so that they do with fewer stages where memory is short.
  static constexpr int kKeyStages = 2, kValueStages = kValue > 128 ? 1 : 2;
  static constexpr int kQueryBytes = tile_bytes(kRowsOfBlock, kKey), kGradBytes = tile_bytes(kRowsOfBlock, kValue);
  static constexpr int kKeyBytes = tile_bytes(kKeys, kKey), kValueBytes = tile_bytes(kKeys, kValue);

  struct Shared {
    Ring<kKeyStages> keys;
    Ring<kValueStages> values;
    uint64_t resident;
    TileNote notes[kKeyStages];
  };
  static constexpr int kTileBytes =
      kQueryBytes + kGradBytes + kKeyStages * kKeyBytes + kValueStages * kValueBytes;
  static constexpr int kSharedBytes = kTileBytes + static_cast<int>(sizeof(Shared));
};

// Where a block works.
struct QueriesPlace {
  int key_head, first_head, first_token, heads, heads_shift;

  __device__ __forceinline__ explicit QueriesPlace(const PrefixAttentionBackward& params) {
    const int block = static_cast<int>(blockIdx.x);
    heads = packed_heads(params.query_heads, params.key_heads);
    heads_shift = shift_of(heads);
    // A block of the order is, for all `query_heads / heads` sets of heads, `heads` tiles.
    const int within = block % params.query_heads;
    first_head = within / heads * heads;
    key_head = first_head / (params.query_heads / params.key_heads);
    first_token = params.query_order[block / params.query_heads] * kOrderTokens +
                  (within % heads) * (kRowsOfBlock >> heads_shift);
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
    load_tile<kRowsOfBlock, Sizes::kKey>(tiles, call.q, place.first_head, place.first_token, place.heads_shift,
                                         &shared.resident);
    load_tile<kRowsOfBlock, Sizes::kValue>(tiles + Tiling::kQueryBytes, call.grad_out, place.first_head,
                                           place.first_token, place.heads_shift, &shared.resident);
  }

  const int own_tokens = 64 >> place.heads_shift;
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
  RingPlace<Tiling::kKeyStages> at;
  RingPlace<Tiling::kValueStages> values_at;
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
      if (lane == 0) {
        shared.keys.wait_empty(at);
        shared.notes[at.stage] = note;
        uint64_t* full = &shared.keys.full[at.stage];
        ptx::mbarrier_arrive_expect_tx(full, Tiling::kKeyBytes);
        load_tile<kKeys, Sizes::kKey>(key_tiles + at.stage * Tiling::kKeyBytes, call.k, place.key_head,
                                      note.first_token, 0, full);
        shared.values.wait_empty(values_at);
        full = &shared.values.full[values_at.stage];
        ptx::mbarrier_arrive_expect_tx(full, Tiling::kValueBytes);
        load_tile<kKeys, Sizes::kValue>(value_tiles + values_at.stage * Tiling::kValueBytes, call.v, place.key_head,
                                        note.first_token, 0, full);
      }
      __syncwarp();
      at.advance();
      values_at.advance();
    }
  }
  if (lane == 0) {
    shared.keys.wait_empty(at);
    shared.notes[at.stage].last = true;
    ptx::mbarrier_arrive(&shared.keys.full[at.stage]);
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
  bool sees[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 64 * group + thread / kWarpSize * 16 + lane / 4 + 8 * i;
    const int token = place.first_token + (row >> place.heads_shift);
    const int head = place.first_head + (row & (place.heads - 1));
    const bool exists = token < tokens;
    const int64_t index = int64_t{token} * params.query_heads + head;
    lse[i] = exists ? __ldg(params.lse + index) * kLog2E : -INFINITY;
    sees[i] = lse[i] != -INFINITY;
    if (!sees[i]) lse[i] = INFINITY;
    delta[i] = sees[i] ? __ldg(params.delta + index) : 0.0f;
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
  RingPlace<Tiling::kValueStages> values_at;
  for (RingPlace<Tiling::kKeyStages> at;; at.advance(), values_at.advance()) {
    shared.keys.wait_full(at);
    const TileNote& note = shared.notes[at.stage];
    if (note.last) break;
    unsigned char* keys = key_tiles + at.stage * Tiling::kKeyBytes;
    unsigned char* values = value_tiles + values_at.stage * Tiling::kValueBytes;
    // Not between the two products: a wait there would have the compiler serialise them.
    shared.values.wait_full(values_at);
    if (note.clears) {
      const auto unseen = [&](int row) {
        const int key = note.first_token + row;
        return key < tokens && __ldg(params.subtree_end + key) <= key;
      };
      clear_rows<kKeys, Sizes::kKey>(keys, 128 * group + thread, 128 * kConsumers, unseen);
      clear_rows<kKeys, Sizes::kValue>(values, 128 * group + thread, 128 * kConsumers, unseen);
      ptx::fence_proxy_async();
      ptx::barrier_sync(1, 128 * kConsumers);
    }
    const Visible visible = note.visible[group];
    if (visible == Visible::none) {
      shared.values.release(values_at);
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

      const int first_key = note.first_token + first_column;
      if (visible == Visible::some) {
        apply_rule<true>(rule, rows, first_key, s);
      } else {
        apply_rule<false>(rule, rows, first_key, s);
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] = fast_exp2(s[i] * rule.factor - lse[i / 2 % 2]);
      ptx::wgmma_wait<0>();
      ptx::keep_in_place(grad_p);
      shared.values.release(values_at);

      if (rule.softcap_log2 > 0.0f) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int key = first_key + 8 * j + c;
            const int32_t position = rule.slopes && key < tokens ? __ldg(params.position + key) : 0;
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
    shared.keys.release(at);
  }

  // Nobody else reads this warpgroup's queries, so their memory takes the gradients.
  write_tile<T, kRowsOfBlock, Sizes::kKey>(query_tile, grad_q, params.scale, sees);
  ptx::fence_proxy_async();
  ptx::barrier_sync(2 + group, 128);
  if (thread == 0) {
    const int first = place.first_token + ((64 * group) >> place.heads_shift);
    store_tile<kRowsOfBlock, Sizes::kKey>(call.grad_q, place.first_head, first, query_tile);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// A block for each tile of rows, longest first, as the kernel for keys has it.
template <class Sizes>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    prefix_attention_backward_queries_kernel(const __grid_constant__ PrefixAttentionBackwardSm90 call) {
  using Tiling = QueriesTiling<Sizes>;
  PYKERN_DYNAMIC_SHARED(tiles);
  auto& shared = *reinterpret_cast<typename Tiling::Shared*>(tiles + Tiling::kTileBytes);
  const QueriesPlace place(call.params);
  // The last block of the order may have no tokens for all of its tiles.
  if (place.first_token >= call.params.tokens) return;
  if (threadIdx.x == 0) {
    shared.keys.init();
    shared.values.init();
    ptx::mbarrier_init(&shared.resident, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::decrease_registers<24>();
    if (threadIdx.x < kWarpSize) produce_keys<Sizes>(call, place, tiles, shared);
  } else {
    ptx::increase_registers<240>();
    consume_keys<Sizes>(call, place, tiles, shared, warpgroup - 1);
  }
}

}  // namespace pykern
