// Gradients of queries.
//
// A block has a tile of queries with packed heads and goes through the keys that they see. A warp holds Q and dO of 16
// queries and the sums of dQ in registers; S = Q K^T and dP = dO V^T become, in its registers, the operand A of
// dQ += dS K. Keys and values come through shared memory, two stages of them.
#pragma once

#include "kernels/attention/pair_weights.cuh"
#include "kernels/attention/shared_rows_sm80.cuh"
#include "kernels/attention/visible_units.cuh"

namespace pykern {

struct KeyStage {
  int key;      // the first, -1 behind the last stage
  bool masked;  // not all queries see all keys
};

// The way of a block through its keys. It lies in shared memory, where one warp walks it: registers hold matrices.
template <int keys>
struct KeyStages {
  TokenBounds queries;
  int first_query, stop_query;
  VisibleUnits units;
  int key, stop_unit;

  __device__ __forceinline__ void begin(const PrefixAttentionProblem& problem, int first, int stop) {
    queries = token_bounds(problem, first, stop);
    first_query = first;
    stop_query = stop;
    units = {0, (stop + kBoundsTokens - 1) / kBoundsTokens, 0, 0, false};
    key = stop_unit = 0;
  }

  // All lanes of the warp call; others may read `plan` after the next barrier.
  __device__ __forceinline__ void advance(const PrefixAttentionProblem& problem, KeyStage& plan) {
    int next = key + keys, unit = 0;
    VisibleUnits ahead{};
    const bool leaves_unit = next >= stop_unit || next >= stop_query;
    if (leaves_unit) {
      ahead = units;
      unit = ahead.advance([&](int candidate) {
        const int first = candidate * kBoundsTokens, stop = first + kBoundsTokens;
        return visible_keys(token_bounds(problem, first, stop), first, stop, queries, first_query, stop_query,
                            problem.window);
      });
      next = unit < 0 ? stop_query : unit * kBoundsTokens;
    }
    const bool all = leaves_unit ? ahead.is_all : units.is_all;
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) {
      plan = {unit < 0 ? -1 : next, !all};
      key = next;
      if (leaves_unit) {
        units = ahead;
        stop_unit = next + kBoundsTokens;
      }
    }
    __syncwarp();
  }
};

template <class Sizes>
struct BackwardQueries {
  static constexpr int kKey = Sizes::kKey, kValue = Sizes::kValue, kLargest = kKey > kValue ? kKey : kValue;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kQueries = 16 * kWarps;
  // Of a stage, and of the accumulators of S.
  static constexpr int kKeys = kLargest <= 64 ? 64 : kLargest <= 192 ? 32 : 16;
  static constexpr int kChunk = kLargest == 128 ? 32 : 16;
  static constexpr int kStageBytes = kKeys * (kKey + kValue) * 2;
  // Q and dO lie where the stages come to lie, or dO behind them where registers can't hold it.
  static constexpr bool kHoldsGradOut = kLargest <= 192;
  static constexpr int kQueryBytes = kQueries * kKey * 2, kGradOutBytes = kQueries * kValue * 2;
  static constexpr int kGradOutFirst = kHoldsGradOut ? kQueryBytes : 2 * kStageBytes;
  static constexpr int kOperandBytes =
      kGradOutFirst + kGradOutBytes > 2 * kStageBytes ? kGradOutFirst + kGradOutBytes : 2 * kStageBytes;
  static_assert(kQueryBytes <= 2 * kStageBytes, "Q and dQ lie in the memory of the stages");
  static constexpr int kBlocksPerProcessor = kLargest <= 64 ? 4 : kLargest <= 96 ? 3 : 2;

  using Way = KeyStages<kKeys>;
  struct Shared {
    Way way;
    KeyStage plans[4];
    ScoreRule rule;
    int first_query, stop_query, first_head, head_shift, key_head;
    PairQuery queries[kQueries];
    float delta[kQueries];
    int end[2][kKeys];
  };
  static constexpr int kSharedBytes = kOperandBytes + static_cast<int>(sizeof(Shared));
  static_assert(kSharedBytes <= 99 * 1024, "the smallest shared memory of 8.0 and newer");
};

template <class Sizes>
__global__ void __launch_bounds__(BackwardQueries<Sizes>::kThreads, BackwardQueries<Sizes>::kBlocksPerProcessor)
    prefix_attention_backward_queries_kernel(PrefixAttentionBackward params) {
  using Tile = BackwardQueries<Sizes>;
  using T = typename Sizes::T;
  constexpr int kKey = Tile::kKey, kValue = Tile::kValue, kKeys = Tile::kKeys, kQueries = Tile::kQueries;
  constexpr int kKeySteps = kKey / 16, kValueSteps = kValue / 16;
  constexpr int kGroups = Tile::kChunk / 16, kHeldSteps = Tile::kHoldsGradOut ? kValueSteps : 1;
  using KeyRows = SharedRows<T, kWholeRows<kKey>>;
  using ValueRows = SharedRows<T, kWholeRows<kValue>>;

  PYKERN_DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(bytes + Tile::kOperandBytes);
  const int thread = threadIdx.x, warp = thread / kWarpSize;

  // The last tiles of a block of tokens see most, so they come first.
  const int heads = packed_heads(params.query_heads, params.key_heads), group = params.query_heads / params.key_heads;
  const int tiles_per_block = kOrderTokens * heads / kQueries, tokens_per_tile = kQueries / heads;
  const int parts = group / heads;
  const int key_head = blockIdx.x % params.key_heads, part = blockIdx.x / params.key_heads % parts;
  const int tile = blockIdx.x / params.key_heads / parts;
  const int first_query = params.query_order[tile / tiles_per_block] * kOrderTokens +
                          (tiles_per_block - 1 - tile % tiles_per_block) * tokens_per_tile;
  if (first_query >= params.tokens) return;
  const int shift = __ffs(heads) - 1, first_head = key_head * group + part * heads;
  const int last = first_query + tokens_per_tile;
  const int stop_query = last < params.tokens ? last : static_cast<int>(params.tokens);

  if (thread < kQueries) {
    const int query = first_query + (thread >> shift), head = first_head + (thread & (heads - 1));
    PairQuery own{query, 0, 0.0f, INFINITY};
    float delta = 0.0f;
    if (query < stop_query) {
      const int64_t statistic = int64_t{query} * params.query_heads + head;
      own.lse = lse_in_log2(__ldg(params.lse + statistic));
      delta = params.delta[statistic];
      own.position = __ldg(params.position + query);
      if (params.alibi_slopes) own.slope = kLog2E * __ldg(params.alibi_slopes + head);
    }
    shared.queries[thread] = own;
    shared.delta[thread] = delta;
  }
  // What the registers have no room for.
  if (thread == 0) {
    shared.rule = ScoreRule(params);
    shared.first_query = first_query;
    shared.stop_query = stop_query;
    shared.first_head = first_head;
    shared.head_shift = shift;
    shared.key_head = key_head;
  }
  __syncthreads();

  // A row that sees nothing may hold anything.
  const auto query_row = [&](const AttentionHeads& tensor, int row) -> const T* {
    if (shared.queries[row].lse == INFINITY) return nullptr;
    return static_cast<const T*>(tensor.data) + shared.queries[row].token * tensor.token_stride +
           (first_head + (row & (heads - 1))) * tensor.head_stride;
  };
  const KeyRows q_rows{bytes, 0, kKey};
  const ValueRows grad_rows{bytes, Tile::kGradOutFirst, kValue};
  copy_rows<kQueries, kKey, Tile::kThreads>(q_rows, params.q.data, params.key_size,
                                            [&](int row) { return query_row(params.q, row); });
  copy_rows<kQueries, kValue, Tile::kThreads>(grad_rows, params.grad_out.data, params.value_size,
                                              [&](int row) { return query_row(params.grad_out, row); });
  ptx::cp_async_commit();
  constexpr int kPlanner = Tile::kWarps - 1;
  if (warp == kPlanner) {
    if (thread % kWarpSize == 0) shared.way.begin(params, first_query, stop_query);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) shared.way.advance(params, shared.plans[i]);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t q[kKeySteps][4], grad_out[kHeldSteps][4];
#pragma unroll
  for (int k = 0; k < kKeySteps; ++k) q_rows.load_a(q[k], thread % kWarpSize, 16 * warp, k);
  if constexpr (Tile::kHoldsGradOut) {
#pragma unroll
    for (int k = 0; k < kValueSteps; ++k) grad_rows.load_a(grad_out[k], thread % kWarpSize, 16 * warp, k);
  }
  float sums[2 * kKeySteps][4] = {};
  __syncthreads();

  const auto start_copies = [&](int stage, int key) {
    const KeyRows k_rows{bytes, stage * Tile::kStageBytes, kKey};
    const ValueRows v_rows{bytes, k_rows.first + kKeys * kKey * 2, kValue};
    const auto key_row = [&](const AttentionHeads& tensor, int row) -> const T* {
      if (key + row >= params.tokens) return nullptr;
      return static_cast<const T*>(tensor.data) + (key + row) * tensor.token_stride +
             shared.key_head * tensor.head_stride;
    };
    copy_rows<kKeys, kKey, Tile::kThreads>(k_rows, params.k.data, params.key_size,
                                           [&](int row) { return key_row(params.k, row); });
    copy_rows<kKeys, kValue, Tile::kThreads>(v_rows, params.v.data, params.value_size,
                                             [&](int row) { return key_row(params.v, row); });
    if (thread < kKeys) {
      const bool exists = key + thread < params.tokens;
      ptx::cp_async<4>(&shared.end[stage][thread], params.subtree_end + (exists ? key + thread : 0), exists ? 4 : 0);
    }
    ptx::cp_async_commit();
  };

  if (shared.plans[0].key >= 0) start_copies(0, shared.plans[0].key);
  for (unsigned index = 0; shared.plans[index % 4].key >= 0; ++index) {
    const int stage = static_cast<int>(index % 2), first_key = shared.plans[index % 4].key;
    const bool masked = shared.plans[index % 4].masked;
    ptx::cp_async_wait<0>();
    // Each thread looks at what it has copied itself.
    const bool holes = __syncthreads_or(thread < kKeys && shared.end[stage][thread] <= first_key + thread);
    const int next_key = shared.plans[(index + 1) % 4].key;
    if (next_key >= 0) start_copies(stage ^ 1, next_key);
    if (warp == kPlanner) shared.way.advance(params, shared.plans[(index + 2) % 4]);

    const KeyRows k_rows{bytes, stage * Tile::kStageBytes, kKey};
    const ValueRows v_rows{bytes, k_rows.first + kKeys * kKey * 2, kValue};
    if (holes) {
      // A key that none sees may hold anything, NaN too, which no weight of 0 takes out of a product.
#pragma unroll 1
      for (int i = ptx::forget_origin(thread); i < kKeys * (kKey + kValue) / 8; i += Tile::kThreads) {
        const int row = i % kKeys, pack = i / kKeys;
        if (shared.end[stage][row] > first_key + row) continue;
        T* target = pack < kKey / 8 ? k_rows.pack(row, pack) : v_rows.pack(row, pack - kKey / 8);
        *reinterpret_cast<Pack<T>*>(target) = Pack<T>{};
      }
      __syncthreads();
    }

#pragma unroll 1
    for (int chunk = 0; chunk < kKeys; chunk += Tile::kChunk) {
      const int lane = ptx::forget_origin(thread) % kWarpSize;
      if (first_key + chunk > shared.queries[16 * warp + 15].token) break;
      float s[2 * kGroups][4] = {}, grad[2 * kGroups][4] = {};
#pragma unroll
      for (int k = 0; k < (kKeySteps > kValueSteps ? kKeySteps : kValueSteps); ++k) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          const int row = chunk + 16 * group;
          uint32_t b[4];
          if (k < kKeySteps) {
            k_rows.load_b_of_columns(b, lane, row, k);
            multiply_both<T>(s[2 * group], s[2 * group + 1], q[k < kKeySteps ? k : 0], b);
          }
          if (k < kValueSteps) {
            v_rows.load_b_of_columns(b, lane, row, k);
            if constexpr (Tile::kHoldsGradOut) {
              multiply_both<T>(grad[2 * group], grad[2 * group + 1], grad_out[k < kValueSteps ? k : 0], b);
            } else {
              uint32_t a[4];
              grad_rows.load_a(a, lane, 16 * warp, k);
              multiply_both<T>(grad[2 * group], grad[2 * group + 1], a, b);
            }
          }
        }
      }

      const auto differentiate = [&](auto masks, auto transforms) {
        constexpr bool kMasks = decltype(masks)::value, kTransforms = decltype(transforms)::value;
        const ScoreRule rule = shared.rule;
        PairQuery queries[2];
        float delta[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = 16 * warp + lane / 4 + 8 * i;
          queries[i].lse = shared.queries[row].lse;
          if (kMasks || kTransforms) queries[i] = shared.queries[row];
          delta[i] = shared.delta[row];
        }
#pragma unroll
        for (int j = 0; j < 2 * kGroups; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = chunk + 8 * j + 2 * (lane % 4) + c;
            PairKey key{first_key + column, 0, 0};
            if (kMasks) key.end = shared.end[stage][column];
            if ((kMasks || kTransforms) && (rule.window > 0 || rule.slopes) && key.token < rule.tokens) {
              key.position = __ldg(rule.position + key.token);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float derivative;
              const float weight =
                  pair_weight<kMasks, kTransforms>(rule, s[j][2 * i + c], queries[i], key, derivative);
              s[j][2 * i + c] = weight * derivative * (grad[j][2 * i + c] - delta[i]);
            }
          }
        }
      };
      if (shared.rule.transforms) {
        masked ? differentiate(std::true_type{}, std::true_type{}) : differentiate(std::false_type{}, std::true_type{});
      } else {
        masked ? differentiate(std::true_type{}, std::false_type{})
               : differentiate(std::false_type{}, std::false_type{});
      }

#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint32_t a[4];
        accumulators_as_a<T>(a, s[2 * group], s[2 * group + 1]);
#pragma unroll
        for (int n = 0; n < kKeySteps; ++n) {
          uint32_t b[4];
          k_rows.load_b_of_rows(b, lane, chunk + 16 * group, n);
          multiply_both<T>(sums[2 * n], sums[2 * n + 1], a, b);
        }
      }
    }
  }

  __syncthreads();
  // Where Q was, lies its gradient.
  store_accumulators(q_rows, 16 * warp, sums, kKey, params.scale);
  __syncthreads();
  store_rows<kQueries, kKey, Tile::kThreads>(q_rows, params.key_size, [&](int row) -> T* {
    const int shift = shared.head_shift;
    const int64_t query = shared.first_query + (row >> shift);
    if (query >= shared.stop_query) return nullptr;
    const int64_t head = shared.first_head + (row & ((1 << shift) - 1));
    return static_cast<T*>(params.grad_q) + (query * params.query_heads + head) * params.key_size;
  });
}

}  // namespace pykern
