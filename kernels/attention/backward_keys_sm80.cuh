// Gradients of keys and values.
//
// A block has a tile of keys and goes through the queries that see them: tiles of packed heads, every part of the head
// group, so that all that a key's gradient is made of is summed in registers, in float32 and in one order. Logits are
// computed transposed, S^T = K Q^T: its accumulators are, rounded, the operand A of dV += P^T dO, and those of
// dP^T = V dO^T that of dK += dS^T Q, so neither goes through shared memory.
//
// Warps work in pairs. Both have the same keys, one has K, S and dV, the other V, dP and dK: one operand of the first
// product and the sums of the second fill a warp's registers, and a row of Q or dO, once read from shared memory,
// serves all keys of the pair. The first warp tells the second the weights P; a pair meets at two barriers of its own.
#pragma once

#include "kernels/attention/pair_weights.cuh"
#include "kernels/attention/shared_rows_sm80.cuh"
#include "kernels/attention/visible_units.cuh"

namespace pykern {

struct QueryStage {
  int token, part;  // the first token, -1 behind the last stage; and the part of the head group
  bool masked;      // not all queries see all keys
};

// The way of a block through its queries. It lies in shared memory, where one warp walks it: registers hold matrices.
template <int queries>
struct QueryStages {
  TokenBounds keys;
  int first_key, stop_key, stop_query, tokens, parts;
  VisibleUnits units;
  int part, token, stop_unit;

  __device__ __forceinline__ void begin(const PrefixAttentionProblem& problem, int first, int stop) {
    keys = token_bounds(problem, first, stop);
    first_key = first;
    stop_key = stop;
    stop_query = keys.last_end < problem.tokens ? keys.last_end : static_cast<int>(problem.tokens);
    const int heads = packed_heads(problem.query_heads, problem.key_heads);
    tokens = queries / heads;
    parts = problem.query_heads / problem.key_heads / heads;
    part = token = stop_unit = 0;
    units = all_units();
  }

  // All lanes of the warp call; others may read `plan` after the next barrier.
  __device__ __forceinline__ void advance(const PrefixAttentionProblem& problem, QueryStage& plan) {
    int next = token + tokens, next_part = part, unit = 0;
    VisibleUnits ahead{};
    const bool leaves_unit = next >= stop_unit || next >= stop_query;
    if (leaves_unit) {
      ahead = units;
      const auto sees = [&](int candidate) { return test(problem, candidate); };
      while ((unit = ahead.advance(sees)) < 0 && ++next_part < parts) ahead = all_units();
      next = unit < 0 ? stop_query : unit * kBoundsTokens;
    }
    // The bounds of positions are those of a unit; of the rest a stage may see all where its unit doesn't.
    const bool all = problem.window > 0 ? (leaves_unit ? ahead.is_all : units.is_all)
                                        : stop_key - 1 <= next && keys.least_end >= next + tokens;
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) {
      plan = {unit < 0 ? -1 : next, next_part, !all};
      token = next;
      part = next_part;
      if (leaves_unit) {
        units = ahead;
        stop_unit = next + kBoundsTokens;
      }
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ VisibleUnits all_units() const {
    return {first_key / kBoundsTokens, (stop_query + kBoundsTokens - 1) / kBoundsTokens, 0, 0, false};
  }

  __device__ __forceinline__ Visible test(const PrefixAttentionProblem& problem, int unit) const {
    const int first = unit * kBoundsTokens, stop = first + kBoundsTokens;
    const TokenBounds bounds = problem.window > 0 ? token_bounds(problem, first, stop) : TokenBounds{};
    return visible_keys(keys, first_key, stop_key, bounds, first, stop, problem.window);
  }
};

template <class Sizes>
struct BackwardKeys {
  static constexpr int kKey = Sizes::kKey, kValue = Sizes::kValue, kLargest = kKey > kValue ? kKey : kValue;
  static constexpr int kPairs = kLargest <= 64 ? 2 : 4, kThreads = 2 * kPairs * kWarpSize;
  // Tiles of 16 keys of a pair: what a warp's registers hold.
  static constexpr int kTiles = kLargest <= 128 ? 2 : 1;
  static constexpr int kKeys = kPairs * 16 * kTiles;
  // Queries of a stage, two of which lie where K and V were before, and of the accumulators of S.
  static constexpr int kQueries = kKeys / 2, kChunk = 32 / kTiles;
  static constexpr int kStageBytes = kQueries * (kKey + kValue) * 2;
  static constexpr int kBlocksPerProcessor = kLargest <= 32 ? 4 : kLargest <= 64 ? 3 : 1;

  using Way = QueryStages<kQueries>;
  struct Shared {
    Way way;
    QueryStage plans[4];
    ScoreRule rule;
    int first_key, key_head, head_shift, group_head;
    float lse[2][kQueries], delta[2][kQueries];
    int end[kKeys], position[kKeys];
    Pack<float> weights[kPairs][4][kWarpSize];
  };
  static constexpr int kOperandBytes = 2 * kStageBytes;
  static constexpr int kSharedBytes = kOperandBytes + static_cast<int>(sizeof(Shared));
  static_assert(kSharedBytes <= 99 * 1024, "the smallest shared memory of 8.0 and newer");
};

// Which warp this is. With four pairs, warps of both kinds are on each of the four parts of a multiprocessor.
template <class Tile>
struct PairWarp {
  int lane, pair;
  bool weighs;  // has K, S and dV; else V, dP and dK

  __device__ __forceinline__ explicit PairWarp(int thread)
      : lane(thread % kWarpSize),
        pair(thread / kWarpSize % Tile::kPairs),
        weighs(thread < Tile::kPairs * kWarpSize) {}

  __device__ __forceinline__ int first_row() const { return pair * 16 * Tile::kTiles; }
  // Blocks of 16 columns of the operand of the first product, and of the sums of the second.
  __device__ __forceinline__ int first_steps() const { return (weighs ? Tile::kKey : Tile::kValue) / 16; }
  __device__ __forceinline__ int second_steps() const { return (weighs ? Tile::kValue : Tile::kKey) / 16; }
};

template <class Sizes>
__global__ void __launch_bounds__(BackwardKeys<Sizes>::kThreads, BackwardKeys<Sizes>::kBlocksPerProcessor)
    prefix_attention_backward_keys_kernel(PrefixAttentionBackward params) {
  using Tile = BackwardKeys<Sizes>;
  using T = typename Sizes::T;
  constexpr int kKey = Tile::kKey, kValue = Tile::kValue, kTiles = Tile::kTiles, kQueries = Tile::kQueries;
  constexpr int kGroups = Tile::kChunk / 16, kSteps = Tile::kLargest / 16;
  constexpr bool kEven = kKey == kValue;
  static_assert(kWholeRows<kKey> == kWholeRows<kValue>, "one kind of rows serves both operands");
  using Rows = SharedRows<T, kWholeRows<kKey>>;

  PYKERN_DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(bytes + Tile::kOperandBytes);
  const int thread = threadIdx.x;
  const int tokens = static_cast<int>(params.tokens);

  constexpr int kTilesPerBlock = kOrderTokens / Tile::kKeys;
  const int key_head = blockIdx.x % params.key_heads, tile = blockIdx.x / params.key_heads;
  const int first_key =
      params.key_order[tile / kTilesPerBlock] * kOrderTokens + tile % kTilesPerBlock * Tile::kKeys;
  if (first_key >= tokens) return;

  if (thread < Tile::kKeys) {
    const int key = first_key + thread;
    shared.end[thread] = key < tokens ? __ldg(params.subtree_end + key) : 0;
    shared.position[thread] = key < tokens ? __ldg(params.position + key) : 0;
  }
  // What the registers have no room for.
  if (thread == 0) {
    shared.rule = ScoreRule(params);
    shared.first_key = first_key;
    shared.key_head = key_head;
    shared.head_shift = __ffs(packed_heads(params.query_heads, params.key_heads)) - 1;
    shared.group_head = key_head * (params.query_heads / params.key_heads);
  }
  __syncthreads();

  // K and V of keys that someone sees; what the others hold may be anything.
  const Rows k_rows{bytes, 0, kKey}, v_rows{bytes, Tile::kKeys * kKey * 2, kValue};
  const auto key_row = [&](const AttentionHeads& heads, int row) -> const T* {
    const int key = first_key + row;
    if (shared.end[row] <= key) return nullptr;
    return static_cast<const T*>(heads.data) + key * heads.token_stride + key_head * heads.head_stride;
  };
  copy_rows<Tile::kKeys, kKey, Tile::kThreads>(k_rows, params.k.data, params.key_size,
                                               [&](int row) { return key_row(params.k, row); });
  copy_rows<Tile::kKeys, kValue, Tile::kThreads>(v_rows, params.v.data, params.value_size,
                                                 [&](int row) { return key_row(params.v, row); });
  ptx::cp_async_commit();
  // A warp that has to wait for weights anyway.
  constexpr int kPlanner = 2 * Tile::kPairs - 1;
  if (thread / kWarpSize == kPlanner) {
    if (thread % kWarpSize == 0) shared.way.begin(params, first_key, first_key + Tile::kKeys);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) shared.way.advance(params, shared.plans[i]);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // The pair's rows of K or V, as A.
  uint32_t keys[kTiles][kSteps][4];
  {
    const PairWarp<Tile> own(thread);
    const Rows rows = choose(own.weighs, k_rows, v_rows);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (!kEven && k >= own.first_steps()) continue;
        rows.load_a(keys[t][k], own.lane, own.first_row() + 16 * t, k);
      }
    }
  }
  float sums[kTiles][2 * kSteps][4] = {};
  __syncthreads();

  const auto start_copies = [&](int stage, const QueryStage& plan) {
    const Rows q_rows{bytes, stage * Tile::kStageBytes, kKey};
    const Rows grad_rows{bytes, q_rows.first + kQueries * kKey * 2, kValue};
    const int shift = shared.head_shift, first_head = shared.group_head + (plan.part << shift);
    const auto query_row = [&](const AttentionHeads& tensor, int row) -> const T* {
      const int query = plan.token + (row >> shift), head = first_head + (row & ((1 << shift) - 1));
      if (query >= params.tokens) return nullptr;
      return static_cast<const T*>(tensor.data) + query * tensor.token_stride + head * tensor.head_stride;
    };
    copy_rows<kQueries, kKey, Tile::kThreads>(q_rows, params.q.data, params.key_size,
                                              [&](int row) { return query_row(params.q, row); });
    copy_rows<kQueries, kValue, Tile::kThreads>(grad_rows, params.grad_out.data, params.value_size,
                                                [&](int row) { return query_row(params.grad_out, row); });
    const int own = ptx::forget_origin(thread);
    if (own < 2 * kQueries) {
      const int row = own % kQueries, query = plan.token + (row >> shift);
      const int head = first_head + (row & ((1 << shift) - 1));
      const float* from = own < kQueries ? params.lse : params.delta;
      const bool exists = query < params.tokens;
      ptx::cp_async<4>(&(own < kQueries ? shared.lse : shared.delta)[stage][row],
                       from + (exists ? int64_t{query} * params.query_heads + head : 0), exists ? 4 : 0);
    }
    ptx::cp_async_commit();
  };

  if (shared.plans[0].token >= 0) start_copies(0, shared.plans[0]);
  for (unsigned index = 0; shared.plans[index % 4].token >= 0; ++index) {
    const int stage = static_cast<int>(index % 2);
    ptx::cp_async_wait<0>();
    // Each thread looks at what it has copied itself.
    const bool holes = __syncthreads_or(thread < kQueries && shared.lse[stage][thread] == -INFINITY);
    const QueryStage next = shared.plans[(index + 1) % 4];
    if (next.token >= 0) start_copies(stage ^ 1, next);
    if (ptx::forget_origin(thread) / kWarpSize == kPlanner) {
      shared.way.advance(params, shared.plans[(index + 2) % 4]);
    }

    const Rows q_rows{bytes, stage * Tile::kStageBytes, kKey};
    const Rows grad_rows{bytes, q_rows.first + kQueries * kKey * 2, kValue};
    if (holes) {
      // A row that sees nothing may hold anything, NaN too, which no weight of 0 takes out of a product.
#pragma unroll 1
      for (int i = ptx::forget_origin(thread); i < kQueries * (kKey + kValue) / 8; i += Tile::kThreads) {
        const int row = i % kQueries, pack = i / kQueries;
        if (shared.lse[stage][row] != -INFINITY) continue;
        T* target = pack < kKey / 8 ? q_rows.pack(row, pack) : grad_rows.pack(row, pack - kKey / 8);
        *reinterpret_cast<Pack<T>*>(target) = Pack<T>{};
      }
      __syncthreads();
    }

    for (int chunk = 0; chunk < kQueries; chunk += Tile::kChunk) {
      // The registers hold no more than sums, keys and s.
      const PairWarp<Tile> own(ptx::forget_origin(thread));
      const int lane = own.lane, pair = own.pair;
      const Rows first_operand = choose(own.weighs, q_rows, grad_rows);
      const Rows second_operand = choose(own.weighs, grad_rows, q_rows);
      float s[kTiles][2 * kGroups][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps * kGroups; ++step) {
        const int k = step / kGroups, group = step % kGroups;
        if (!kEven && k >= own.first_steps()) continue;
        uint32_t b[4];
        first_operand.load_b_of_columns(b, lane, chunk + 16 * group, k);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) multiply_both<T>(s[t][2 * group], s[t][2 * group + 1], keys[t][k], b);
      }

      if (own.weighs) {
        if (chunk > 0) ptx::barrier_sync(1 + Tile::kPairs + pair, 2 * kWarpSize);
        const auto weigh = [&](auto masks, auto transforms) {
          constexpr bool kMasks = decltype(masks)::value, kTransforms = decltype(transforms)::value;
          const ScoreRule rule = shared.rule;
          const QueryStage plan = shared.plans[index % 4];
          const int shift = shared.head_shift, first_head = shared.group_head + (plan.part << shift);
          auto& weights = shared.weights[pair];
#pragma unroll
          for (int j = 0; j < 2 * kGroups; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int column = chunk + 8 * j + 2 * (lane % 4) + c;
              PairQuery query{plan.token + (column >> shift), 0, 0.0f, lse_in_log2(shared.lse[stage][column])};
              if ((kMasks || kTransforms) && (rule.window > 0 || rule.slopes) && query.token < rule.tokens) {
                query.position = __ldg(params.position + query.token);
              }
              if (kTransforms && rule.slopes) {
                query.slope = kLog2E * __ldg(params.alibi_slopes + first_head + (column & ((1 << shift) - 1)));
              }
#pragma unroll
              for (int i = 0; i < 2 * kTiles; ++i) {
                const int row = own.first_row() + 8 * i + lane / 4;
                PairKey key{shared.first_key + row, 0, 0};
                if (kMasks) key.end = shared.end[row];
                if (kMasks || kTransforms) key.position = shared.position[row];
                float& score = s[i / 2][j][i % 2 * 2 + c];
                float derivative;
                score = pair_weight<kMasks, kTransforms>(rule, score, query, key, derivative);
                if (kTransforms) weights[i / 2 * 2 * kGroups + j][lane][i % 2 * 2 + c] = score * derivative;
              }
            }
            if constexpr (!kTransforms) {
#pragma unroll
              for (int t = 0; t < kTiles; ++t) {
                weights[t * 2 * kGroups + j][lane] = {s[t][j][0], s[t][j][1], s[t][j][2], s[t][j][3]};
              }
            }
          }
        };
        const bool masked = shared.plans[index % 4].masked;
        if (shared.rule.transforms) {
          masked ? weigh(std::true_type{}, std::true_type{}) : weigh(std::false_type{}, std::true_type{});
        } else {
          masked ? weigh(std::true_type{}, std::false_type{}) : weigh(std::false_type{}, std::false_type{});
        }
        ptx::barrier_arrive(1 + pair, 2 * kWarpSize);
      } else {
        ptx::barrier_sync(1 + pair, 2 * kWarpSize);
#pragma unroll
        for (int j = 0; j < 2 * kGroups; ++j) {
          float delta[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) delta[c] = shared.delta[stage][chunk + 8 * j + 2 * (lane % 4) + c];
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            const Pack<float> weights = shared.weights[pair][t * 2 * kGroups + j][lane];
#pragma unroll
            for (int i = 0; i < 4; ++i) s[t][j][i] = weights[i] * (s[t][j][i] - delta[i % 2]);
          }
        }
        if (chunk + Tile::kChunk < kQueries) ptx::barrier_arrive(1 + Tile::kPairs + pair, 2 * kWarpSize);
      }

#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint32_t a[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) accumulators_as_a<T>(a[t], s[t][2 * group], s[t][2 * group + 1]);
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
          if (!kEven && n >= own.second_steps()) continue;
          uint32_t b[4];
          second_operand.load_b_of_rows(b, lane, chunk + 16 * group, n);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) multiply_both<T>(sums[t][2 * n], sums[t][2 * n + 1], a[t], b);
        }
      }
    }
  }

  __syncthreads();
  // Where K and V were, lie their gradients.
  const PairWarp<Tile> own(ptx::forget_origin(thread));
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    store_accumulators(choose(own.weighs, v_rows, k_rows), own.first_row() + 16 * t, sums[t],
                       own.weighs ? kValue : kKey, own.weighs ? 1.0f : params.scale);
  }
  __syncthreads();
  const auto grad_row = [&](void* grad, int size, int row) -> T* {
    const int64_t key = shared.first_key + row;
    if (key >= params.tokens) return nullptr;
    return static_cast<T*>(grad) + (key * params.key_heads + shared.key_head) * size;
  };
  store_rows<Tile::kKeys, kKey, Tile::kThreads>(
      k_rows, params.key_size, [&](int row) { return grad_row(params.grad_k, params.key_size, row); });
  store_rows<Tile::kKeys, kValue, Tile::kThreads>(
      v_rows, params.value_size, [&](int row) { return grad_row(params.grad_v, params.value_size, row); });
}

}  // namespace pykern
