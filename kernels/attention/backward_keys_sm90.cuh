// Gradients of keys and values on sm_90a.
//
// A block owns 128 keys of one key head, a consumer warpgroup 64 of them. Queries that see a key are one contiguous
// range; the producer has tiles of them copied, for all query heads of the key head one after the other, so that both
// gradients are summed in float32 in registers, in one order. The products are transposed: rows are keys, columns are
// queries. Then weights and their gradients are operands in registers for the sums over queries as they come out.
#pragma once

#include "kernels/attention/backward_sm90.cuh"
#include "kernels/attention/scores_transposed.cuh"

namespace pykern {

constexpr int kKeysOfBlock = 64 * kConsumers;
static_assert(kKeysOfBlock == kOrderTokens, "a block of the order is a tile of keys");

template <class Sizes>
struct KeysTiling {
  static constexpr int kKey = Sizes::kKey, kValue = Sizes::kValue;
  static constexpr int kRows = 64;  // queries of a tile
  static constexpr int kStages = 4;
  // Whether the sum for values goes on while the gradients of the logits are computed; else it would cost registers
  // that there are not, and the compiler would serialise all products.
  static constexpr int kLeftOver = kKey + kValue <= 192 ? 1 : 0;
  static constexpr int kKeyBytes = tile_bytes(kKeysOfBlock, kKey), kValueBytes = tile_bytes(kKeysOfBlock, kValue);
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
    TileNote notes[kStages];
    alignas(16) Columns columns[kStages];
  };
  static constexpr int kTileBytes = kKeyBytes + kValueBytes + kStages * kStageBytes;
  static constexpr int kSharedBytes = kTileBytes + static_cast<int>(sizeof(Shared));
};

// Where a block works.
struct KeysPlace {
  int key_head, first_key;
  int group, heads, heads_shift;

  __device__ __forceinline__ explicit KeysPlace(const PrefixAttentionBackward& params) {
    const int block = static_cast<int>(blockIdx.x);
    key_head = block % params.key_heads;
    first_key = params.key_order[block / params.key_heads] * kKeysOfBlock;
    group = params.query_heads / params.key_heads;
    heads = packed_heads(params.query_heads, params.key_heads);
    heads_shift = shift_of(heads);
  }
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
    load_tile<kKeysOfBlock, Sizes::kKey>(tiles, call.k, place.key_head, place.first_key, 0, &shared.resident);
    load_tile<kKeysOfBlock, Sizes::kValue>(tiles + Tiling::kKeyBytes, call.v, place.key_head, place.first_key, 0,
                                           &shared.resident);
  }

  TokenBounds keys[kConsumers];
  int stop = 0;
#pragma unroll
  for (int w = 0; w < kConsumers; ++w) {
    const int first = place.first_key + 64 * w;
    keys[w] = first < tokens ? token_bounds(params, first, first + 64) : TokenBounds{};
    stop = keys[w].last_end > stop ? keys[w].last_end : stop;
  }

  const bool positions = params.window > 0 || params.alibi_slopes != nullptr;
  const int tile_tokens = kRows >> place.heads_shift;
  RingPlace<Tiling::kStages> at;
  for (int part = 0; part < place.group / place.heads; ++part) {
    const int first_head = place.key_head * place.group + part * place.heads;
    for (int base = place.first_key; base < stop; base += kWarpSize * tile_tokens) {
      // A lane looks at a tile.
      const int own = base + lane * tile_tokens;
      int visible[kConsumers];
      bool any = false;
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) visible[w] = static_cast<int>(Visible::none);
      if (own < stop) {
        const TokenBounds queries = token_bounds(params, own, own + tile_tokens);
#pragma unroll
        for (int w = 0; w < kConsumers; ++w) {
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
        for (int w = 0; w < kConsumers; ++w) {
          note.visible[w] = static_cast<Visible>(__shfl_sync(kFullWarp, visible[w], source));
        }
        float lse[kRows / kWarpSize], delta[kRows / kWarpSize], slope[kRows / kWarpSize];
        int32_t position[kRows / kWarpSize];
        bool clears = false;
#pragma unroll
        for (int i = 0; i < kRows / kWarpSize; ++i) {
          const int row = lane + kWarpSize * i, token = note.first_token + (row >> place.heads_shift);
          const int head = first_head + (row & (place.heads - 1));
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

        shared.ring.wait_empty(at);
        typename Tiling::Columns& columns = shared.columns[at.stage];
#pragma unroll
        for (int i = 0; i < kRows / kWarpSize; ++i) {
          const int row = lane + kWarpSize * i;
          columns.lse[row / 2].values[row % 2] = lse[i];
          columns.delta[row / 2].values[row % 2] = delta[i];
          columns.token[row] = note.first_token + (row >> place.heads_shift);
          if (positions) columns.position[row] = position[i];
          if (params.alibi_slopes) columns.slope[row] = slope[i];
        }
        __syncwarp();
        if (lane == 0) {
          shared.notes[at.stage] = note;
          uint64_t* full = &shared.ring.full[at.stage];
          unsigned char* stage = tiles + Tiling::kKeyBytes + Tiling::kValueBytes + at.stage * Tiling::kStageBytes;
          ptx::mbarrier_arrive_expect_tx(full, Tiling::kStageBytes);
          load_tile<kRows, Sizes::kKey>(stage, call.q, first_head, note.first_token, place.heads_shift, full);
          load_tile<kRows, Sizes::kValue>(stage + Tiling::kQueryBytes, call.grad_out, first_head, note.first_token,
                                          place.heads_shift, full);
        }
        at.advance();
      }
    }
  }
  shared.ring.wait_empty(at);
  if (lane == 0) {
    shared.notes[at.stage].last = true;
    ptx::mbarrier_arrive(&shared.ring.full[at.stage]);
  }
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
  const int thread = threadIdx.x % 128, lane = thread % kWarpSize, tokens = static_cast<int>(params.tokens);
  const int first_column = lane % 4 * 2;
  const bool positions = params.window > 0 || params.alibi_slopes != nullptr;

  KeyRows keys{};
  bool seen[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = place.first_key + 64 * group + thread / kWarpSize * 16 + lane / 4 + 8 * i;
    keys.token[i] = key;
    keys.end[i] = key < tokens ? __ldg(params.subtree_end + key) : 0;
    keys.position[i] = positions && key < tokens ? __ldg(params.position + key) : 0;
    seen[i] = keys.end[i] > key;
  }

  float grad_k[Sizes::kKey / 2], grad_v[Sizes::kValue / 2], s[kRows / 2], grad_p[kRows / 2];
#pragma unroll
  for (int i = 0; i < Sizes::kKey / 2; ++i) grad_k[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < Sizes::kValue / 2; ++i) grad_v[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) s[i] = grad_p[i] = 0.0f;

  unsigned char* key_tile = tiles + group * kOwnBytes;
  unsigned char* value_tile = tiles + Tiling::kKeyBytes + group * kOwnBytes;
  const uint64_t key_rows = rows_of(key_tile), value_rows = rows_of(value_tile);
  ptx::mbarrier_wait(&shared.resident, 0);
  for (RingPlace<Tiling::kStages> at;; at.advance()) {
    shared.ring.wait_full(at);
    const TileNote& note = shared.notes[at.stage];
    if (note.last) break;
    const typename Tiling::Columns& columns = shared.columns[at.stage];
    unsigned char* queries = tiles + Tiling::kKeyBytes + Tiling::kValueBytes + at.stage * Tiling::kStageBytes;
    unsigned char* grads = queries + Tiling::kQueryBytes;
    if (note.clears) {
      const auto sees_nothing = [&](int row) { return columns.lse[row / 2].values[row % 2] == INFINITY; };
      clear_rows<kRows, Sizes::kKey>(queries, 128 * group + thread, 128 * kConsumers, sees_nothing);
      clear_rows<kRows, Sizes::kValue>(grads, 128 * group + thread, 128 * kConsumers, sees_nothing);
      ptx::fence_proxy_async();
      ptx::barrier_sync(1, 128 * kConsumers);
    }
    const Visible visible = note.visible[group];
    if (visible != Visible::none) {
      ptx::keep_in_place(s);
      ptx::keep_in_place(grad_p);
      ptx::wgmma_fence();
      multiply_rows<T, kKeysOfBlock, kRows, Sizes::kKey>(s, key_rows, rows_of(queries));
      ptx::wgmma_commit();
      multiply_rows<T, kKeysOfBlock, kRows, Sizes::kValue>(grad_p, value_rows, rows_of(grads));
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::keep_in_place(s);

      const QueryColumns query_columns{columns.token, columns.position, columns.slope};
      apply_rule(rule, keys, query_columns, first_column, visible == Visible::some, s);
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        const typename Tiling::Two lse = columns.lse[first_column / 2 + 4 * j];
#pragma unroll
        for (int i = 0; i < 4; ++i) s[4 * j + i] = fast_exp2(s[4 * j + i] * rule.factor - lse.values[i % 2]);
      }
      uint32_t weights[kRows / 16][4];
      as_operand<T>(s, weights);
      keep_in_place(weights);
      ptx::keep_in_place(grad_v);
      ptx::wgmma_fence();
      accumulate_columns<T>(grad_v, weights, columns_of(grads, kRows));
      ptx::wgmma_commit();
      ptx::wgmma_wait<Tiling::kLeftOver>();
      ptx::keep_in_place(grad_p);

      if (rule.softcap_log2 > 0.0f) {
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const typename Tiling::Two lse = columns.lse[first_column / 2 + 4 * j];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = first_column + 8 * j + i % 2;
            const float distance =
                rule.slopes ? columns.slope[column] *
                                  static_cast<float>(columns.position[column] - keys.position[i / 2])
                            : 0.0f;
            const float weight = s[4 * j + i];
            const float delta = columns.delta[column / 2].values[i % 2];
            s[4 * j + i] = weight * (grad_p[4 * j + i] - delta) *
                           softcap_derivative(rule, weight, lse.values[i % 2], distance);
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const typename Tiling::Two delta = columns.delta[first_column / 2 + 4 * j];
#pragma unroll
          for (int i = 0; i < 4; ++i) s[4 * j + i] *= grad_p[4 * j + i] - delta.values[i % 2];
        }
      }
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
    shared.ring.release(at);
  }

  // Nobody else reads this warpgroup's keys and values, so their memory takes the gradients.
  write_tile<T, kKeysOfBlock, Sizes::kKey>(key_tile, grad_k, params.scale, seen);
  write_tile<T, kKeysOfBlock, Sizes::kValue>(value_tile, grad_v, 1.0f, seen);
  ptx::fence_proxy_async();
  ptx::barrier_sync(2 + group, 128);
  if (thread == 0) {
    const int first = place.first_key + 64 * group;
    store_tile<kKeysOfBlock, Sizes::kKey>(call.grad_k, place.key_head, first, key_tile);
    store_tile<kKeysOfBlock, Sizes::kValue>(call.grad_v, place.key_head, first, value_tile);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// A block for each key head and tile of keys, longest first: the hardware hands the next to the first that is free,
// which balances tiles of very different length better than a persistent grid with a fixed share.
template <class Sizes>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    prefix_attention_backward_keys_kernel(const __grid_constant__ PrefixAttentionBackwardSm90 call) {
  using Tiling = KeysTiling<Sizes>;
  PYKERN_DYNAMIC_SHARED(tiles);
  auto& shared = *reinterpret_cast<typename Tiling::Shared*>(tiles + Tiling::kTileBytes);
  if (threadIdx.x == 0) {
    shared.ring.init();
    ptx::mbarrier_init(&shared.resident, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const KeysPlace place(call.params);
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::decrease_registers<40>();
    if (threadIdx.x < kWarpSize) produce_queries<Sizes>(call, place, tiles, shared);
  } else {
    ptx::increase_registers<232>();
    consume_queries<Sizes>(call, place, tiles, shared, warpgroup - 1);
  }
}

}  // namespace pykern
