// Forward of prefix attention for compute capability 9.0a.
//
// A block stays on its multiprocessor and takes one tile of 128 queries after the other. One warp copies: the queries,
// then every tile of keys and values that one of them sees, several stages ahead. Two warpgroups compute, each for 64
// of the queries: while the tensor cores work at the product with the next keys and at that of the weights with the
// values, the weights of the next keys are made; and the two take turns, so that one's products run during the other's
// exponentials.
//
// The machine code is as fragile as it is fast: look there after a change for spills, for the order of exponentials and
// WARPGROUP.DEPBAR, and for what ptxas says of products that it serializes or fences.
#pragma once

#include "kernels/attention/online_softmax.cuh"
#include "kernels/attention/schedule_sm90.cuh"
#include "kernels/ptx/sm90.cuh"

namespace pykern {

// Tiles in shared memory are panels of 64 elements by all rows: what the swizzle of 128 bytes spans.
constexpr int kPanelSize = 64, kPanelRowBytes = 128;
// Warpgroups that compute, and what each takes of a tile of queries.
constexpr int kForwardGroups = 2, kGroupRows = kForwardRows / kForwardGroups;
constexpr int kForwardThreads = 128 * (1 + kForwardGroups);
static_assert(kGroupRows == 64, "a warpgroup multiplies 64 rows");

struct alignas(8) KeyEnds {
  int32_t end[2];  // of two neighbouring keys
};

// Phases of `full` end when a copy has landed, those of `empty` when all warps that compute with it have read it.
template <int stages, int keys>
struct ForwardBarriers {
  uint64_t query_full[kForwardGroups], query_empty[kForwardGroups];
  uint64_t key_full[stages], key_empty[stages];
  uint64_t value_full[stages], value_empty[stages];
  uint64_t value_copied;  // of values that are not full before padding has been taken out
  // What the copying warp hands on with the queries and with the keys of a stage; after the last queries, token -1.
  int query_token[kForwardGroups], query_head[kForwardGroups];
  KeyTile key_tile[stages];
  // Of masked tiles, 0 behind the last token. They are read when the stage of their keys is already free again: tile n
  // follows tile n - stages - 1, all of whose readers have gone on to the next one's keys.
  KeyEnds key_ends[stages + 1][keys / 2];
};

template <class Sizes>
struct ForwardTiles {
  static constexpr int kKeys = Sizes::kValue > 128 ? 64 : 128;
  static constexpr int kKeyPanels = (Sizes::kKey + kPanelSize - 1) / kPanelSize;
  static constexpr int kValuePanels = (Sizes::kValue + kPanelSize - 1) / kPanelSize;

  // Each warpgroup has queries of its own.
  static constexpr int kQueryPanelBytes = kGroupRows * kPanelRowBytes, kPanelBytes = kKeys * kPanelRowBytes;
  static constexpr int kQueryBytes = kKeyPanels * kQueryPanelBytes;
  static constexpr int kKeyBytes = kKeyPanels * kPanelBytes, kValueBytes = kValuePanels * kPanelBytes;

  // A little of the 227 KiB is left for barriers, rounded up to the tiles' alignment.
  static constexpr int kStagesThatFit = (224 * 1024 - kForwardGroups * kQueryBytes) / (kKeyBytes + kValueBytes);
  static constexpr int kStages = kStagesThatFit < 4 ? kStagesThatFit : 4;
  static_assert(kStages >= 2, "tiles too large for shared memory");
  using Barriers = ForwardBarriers<kStages, kKeys>;
  static constexpr int kFirstKeys = kForwardGroups * kQueryBytes, kFirstValues = kFirstKeys + kStages * kKeyBytes;
  static constexpr int kSharedBytes = kFirstValues + kStages * kValueBytes;
  static_assert(kSharedBytes + (sizeof(Barriers) + 1023) / 1024 * 1024 <= 227 * 1024, "too much shared memory");
};

// All that a launch knows, so that no thread has to keep it in registers.
struct ForwardSm90 : PrefixAttentionForward {
  ScoreRule rule;
  QuerySchedule schedule;
  TensorMap query_map, key_map, value_map;

  explicit ForwardSm90(const PrefixAttentionForward& problem)
      : PrefixAttentionForward(problem), rule(problem), schedule(problem) {}
};

// The stage of a tile, counted from the block's first, and the parity of the phase of its barriers.
template <int stages>
struct StageTurn {
  uint32_t tile = 0;

  __device__ __forceinline__ int stage() const { return static_cast<int>(tile % stages); }
  __device__ __forceinline__ uint32_t parity() const { return tile / stages & 1; }
  __device__ __forceinline__ int end_slot() const { return static_cast<int>(tile % (stages + 1)); }
};

// --- the copying warp ------------------------------------------------------------------------------------------

template <class Sizes>
struct ForwardCopies {
  using Tiles = ForwardTiles<Sizes>;
  using Barriers = typename Tiles::Barriers;
  using Turn = StageTurn<Tiles::kStages>;

  const ForwardSm90& params;
  unsigned char* shared;
  Barriers& barriers;
  Turn keys, values;
  uint32_t query_parity = 1, copied_parity = 0;

  // A token of -1: no more queries.
  __device__ __forceinline__ void copy_queries(int token, int head) {
    if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
      for (int group = 0; group < kForwardGroups; ++group) {
        uint64_t* full = &barriers.query_full[group];
        ptx::mbarrier_wait(&barriers.query_empty[group], query_parity);
        const int first = token < 0 ? -1 : token + group * (kGroupRows >> params.schedule.packed_log2);
        barriers.query_token[group] = first;
        barriers.query_head[group] = head;
        if (token < 0) {
          ptx::mbarrier_arrive(full);
          continue;
        }
        ptx::mbarrier_arrive_expect_tx(full, Tiles::kQueryBytes);
#pragma unroll
        for (int panel = 0; panel < Tiles::kKeyPanels; ++panel) {
          ptx::tensor_load(shared + group * Tiles::kQueryBytes + panel * Tiles::kQueryPanelBytes, params.query_map,
                           {panel * kPanelSize, head, first}, full);
        }
      }
    }
    query_parity ^= 1;
  }

  __device__ __forceinline__ void copy_keys(const KeyTile& tile, int key_head) {
    constexpr int kEnds = Tiles::kKeys / kWarpSize;
    const int lane = threadIdx.x % kWarpSize, stage = keys.stage();
    uint64_t* full = &barriers.key_full[stage];
    int32_t ends[kEnds] = {};
    if (tile.is_masked()) {
#pragma unroll
      for (int i = 0; i < kEnds; ++i) {
        const int key = tile.first() + i * kWarpSize + lane;
        if (key < params.rule.tokens) ends[i] = __ldg(params.subtree_end + key);
      }
    }
    if (lane == 0) {
      ptx::mbarrier_wait(&barriers.key_empty[stage], keys.parity() ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, Tiles::kKeyBytes);
      unsigned char* target = shared + Tiles::kFirstKeys + stage * Tiles::kKeyBytes;
#pragma unroll
      for (int panel = 0; panel < Tiles::kKeyPanels; ++panel) {
        ptx::tensor_load(target + panel * Tiles::kPanelBytes, params.key_map,
                         {panel * kPanelSize, key_head, tile.first()}, full);
      }
      barriers.key_tile[stage] = tile;
    }
    if (tile.is_masked()) {
      __syncwarp();  // the wait above was for all lanes
#pragma unroll
      for (int i = 0; i < kEnds; ++i) {
        const int key = i * kWarpSize + lane;
        barriers.key_ends[keys.end_slot()][key / 2].end[key % 2] = ends[i];
      }
      __syncwarp();
    }
    if (lane == 0) ptx::mbarrier_arrive(full);
    ++keys.tile;
  }

  __device__ __forceinline__ void copy_values(const KeyTile& tile, int key_head) {
    const int lane = threadIdx.x % kWarpSize, stage = values.stage();
    unsigned char* target = shared + Tiles::kFirstValues + stage * Tiles::kValueBytes;
    uint64_t* full = &barriers.value_full[stage];
    if (lane == 0) {
      uint64_t* copied = tile.has_padding() ? &barriers.value_copied : full;
      ptx::mbarrier_wait(&barriers.value_empty[stage], values.parity() ^ 1);
      ptx::mbarrier_arrive_expect_tx(copied, Tiles::kValueBytes);
#pragma unroll
      for (int panel = 0; panel < Tiles::kValuePanels; ++panel) {
        ptx::tensor_load(target + panel * Tiles::kPanelBytes, params.value_map,
                         {panel * kPanelSize, key_head, tile.first()}, copied);
      }
    }
    if (tile.has_padding()) {
      ptx::mbarrier_wait(&barriers.value_copied, copied_parity);
      copied_parity ^= 1;
      clear_padding(tile.first(), target);
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(full);
    }
    ++values.tile;
  }

  // Values of keys that no query sees may be anything, but their weight of 0 times NaN were NaN.
  __device__ __forceinline__ void clear_padding(int first_key, unsigned char* target) {
#pragma unroll 1
    for (int row = threadIdx.x % kWarpSize; row < Tiles::kKeys; row += kWarpSize) {
      const int key = first_key + row;
      if (key >= params.rule.tokens || __ldg(params.subtree_end + key) > key) continue;
#pragma unroll 1
      for (int panel = 0; panel < Tiles::kValuePanels; ++panel) {
        auto* chunks = reinterpret_cast<Pack<uint32_t>*>(target + panel * Tiles::kPanelBytes + row * kPanelRowBytes);
#pragma unroll
        for (int chunk = 0; chunk < kPanelRowBytes / 16; ++chunk) chunks[chunk] = Pack<uint32_t>{};
      }
    }
  }
};

// A tile's values are asked for after the next tile's keys, which are needed sooner.
template <class Sizes>
__device__ __forceinline__ void copy_forward_tiles(const ForwardSm90& params, unsigned char* shared,
                                                   typename ForwardTiles<Sizes>::Barriers& barriers) {
  ForwardCopies<Sizes> copies{params, shared, barriers, {}, {}};
  ForwardQueries queries;
  for (int turn = 0; params.schedule.find(params, turn, queries); ++turn) {
    VisibleKeyTiles<ForwardTiles<Sizes>::kKeys> tiles(params, queries);
    KeyTile tile{};
    for (bool first = true; !tile.is_last(); first = false) {
      KeyTile next = tiles.next();
      if (first) next.bits |= KeyTile::kFirst;
      copies.copy_keys(next, queries.key_head);
      if (first) {
        copies.copy_queries(queries.first, queries.first_head);
      } else {
        copies.copy_values(tile, queries.key_head);
      }
      tile = next;
    }
    copies.copy_values(tile, queries.key_head);
  }
  copies.copy_queries(-1, 0);
}

// --- the computing warpgroups ----------------------------------------------------------------------------------

template <class Sizes>
struct ForwardProducts {
  using T = typename Sizes::T;
  using Tiles = ForwardTiles<Sizes>;
  static constexpr int kScores = Tiles::kKeys / 2, kSums = Sizes::kValue / 2, kSteps = Tiles::kKeys / 16;

  // The lower halves of descriptors, of the first stage. The upper halves are all the same, and no sum of addresses
  // carries into them; sums of 64 bits would take more registers than there are.
  uint32_t queries, keys, values;

  __device__ __forceinline__ ForwardProducts(unsigned char* shared, int group) {
    queries = lower_half(shared + group * Tiles::kQueryBytes, 0);
    keys = lower_half(shared + Tiles::kFirstKeys, 0);
    // Along a key's values: from panel to panel.
    values = lower_half(shared + Tiles::kFirstValues, Tiles::kPanelBytes);
  }

  __device__ __forceinline__ void with_keys(float (&s)[kScores], int stage) const {
    // As if they changed: else the descriptors of all steps would be kept in registers through the loop.
    uint32_t lower[] = {queries};
    ptx::keep_in_place(lower);
#pragma unroll
    for (int k = 0; k < Sizes::kKey; k += 16) {
      const int panel = k / kPanelSize, offset = k % kPanelSize * 2;
      ptx::wgmma<T>(s, descriptor(lower[0], panel * Tiles::kQueryPanelBytes + offset),
                    descriptor(keys, stage * Tiles::kKeyBytes + panel * Tiles::kPanelBytes + offset), k > 0);
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void with_values(float (&o)[kSums], const uint32_t (&weights)[kSteps][4],
                                              int stage) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma<T, ptx::Major::mn>(
          o, weights[step], descriptor(values, stage * Tiles::kValueBytes + 16 * kPanelRowBytes * step), true);
    }
    ptx::wgmma_commit();
  }

 private:
  static constexpr ptx::MatrixDescriptor kMatrix{0, 0, 8 * kPanelRowBytes, 0, ptx::Swizzle::bytes128};

  __device__ static __forceinline__ uint32_t lower_half(const unsigned char* tile, int leading) {
    ptx::MatrixDescriptor matrix = kMatrix;
    matrix.address = ptx::shared_address(tile);
    matrix.leading = static_cast<uint32_t>(leading);
    return static_cast<uint32_t>(encode(matrix));
  }
  __device__ static __forceinline__ uint64_t descriptor(uint32_t lower, int bytes) {
    constexpr uint64_t kUpper = encode(kMatrix) >> 32 << 32;
    return kUpper | (lower + (static_cast<uint32_t>(bytes) >> 4));
  }
};

// The two rows of 64 that a thread computes: `row` and the one 8 further on.
struct ForwardRows {
  int first_token, first_head, row;

  __device__ __forceinline__ int token(const ForwardSm90& params, int i) const {
    const int token = first_token + ((row + 8 * i) >> params.schedule.packed_log2);
    return token < params.rule.tokens ? token : -1;
  }
  __device__ __forceinline__ int head(const ForwardSm90& params, int i) const {
    return first_head + ((row + 8 * i) & ((1 << params.schedule.packed_log2) - 1));
  }
  // Made anew for each tile of keys: registers are short in between.
  __device__ __forceinline__ QueryRows describe(const ForwardSm90& params) const {
    const ScoreRule& rule = params.rule;
    QueryRows rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows.token[i] = token(params, i);
      const bool placed = rows.token[i] >= 0 && (rule.window > 0 || rule.slopes);
      rows.position[i] = placed ? __ldg(rule.position + rows.token[i]) : 0;
      rows.slope[i] = rule.slopes ? __ldg(params.alibi_slopes + head(params, i)) * kLog2E : 0.0f;
    }
    return rows;
  }
};

template <class T, int n>
__device__ __forceinline__ void store_forward(const ForwardSm90& params, const ForwardRows& rows,
                                              const OnlineSoftmax& softmax, const float (&o)[n]) {
  const float factor = params.rule.factor;
  const bool keeps_statistics = threadIdx.x % 4 == 0;
  float largest[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = rows.token(params, i), head = rows.head(params, i);
    const bool exists = token >= 0;
    const SoftmaxRow result = softmax.finish(i, factor, params.sinks ? params.sinks + head : nullptr);
    const int64_t at = int64_t{token} * params.query_heads + head;
    if (exists && keeps_statistics) params.lse[at] = result.lse;
    store_row<T>(exists ? static_cast<T*>(params.out) + at * params.value_size : nullptr, params.value_size, o, i,
                 result);
    largest[i] = exists ? softmax.largest[i] * factor * kLn2 : -INFINITY;
  }
  const int packed = 1 << params.schedule.packed_log2;
  if (params.max_logits) store_max_logits(params.max_logits, rows.first_head, packed, largest);
}

// One stream of tiles through all queries of the block. While the weights of a tile are made, the product of those
// before with their values is under way, and that of the next tile's keys comes with it, be they other queries' keys.
template <class Sizes>
__device__ __forceinline__ void compute_forward(const ForwardSm90& params, unsigned char* shared,
                                                typename ForwardTiles<Sizes>::Barriers& barriers) {
  using Products = ForwardProducts<Sizes>;
  using Turn = StageTurn<ForwardTiles<Sizes>::kStages>;
  using T = typename Sizes::T;
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0) - 4, lane = threadIdx.x % 32;
  const int group = warp / 4;
  const ScoreRule& rule = params.rule;
  const Products products(shared, group);
  // Of named barriers, for whose turn it is to issue products; the first warpgroup begins.
  const auto own_turn = [&] { return 1 + group; };
  const auto other_turn = [&] { return 2 - group; };

  Turn keys;
  uint32_t query_parity = 0;
  const auto next_queries = [&] {
    ptx::mbarrier_wait(&barriers.query_full[group], query_parity);
    query_parity ^= 1;
    return barriers.query_token[group] >= 0;
  };
  const auto next_rows = [&] {
    return ForwardRows{barriers.query_token[group], barriers.query_head[group], 16 * (warp % 4) + lane / 4};
  };
  const auto next_tile = [&] {
    ptx::mbarrier_wait(&barriers.key_full[keys.stage()], keys.parity());
    return barriers.key_tile[keys.stage()];
  };

  if (!next_queries()) return;
  if (group == 1) ptx::barrier_arrive(other_turn(), 256);
  ForwardRows rows = next_rows();
  KeyTile tile = next_tile();
  OnlineSoftmax softmax;
  float s[Products::kScores], o[Products::kSums];
  uint32_t weights[Products::kSteps][4];
#pragma unroll
  for (int i = 0; i < Products::kSums; ++i) o[i] = 0.0f;
  ptx::keep_in_place(s);
  ptx::wgmma_fence();
  products.with_keys(s, keys.stage());
  ptx::wgmma_wait<0>();
  ptx::keep_in_place(s);
  for (;;) {
    const bool first = tile.is_first(), last = tile.is_last();
    __syncwarp();  // all lanes have read what was handed on with the tile
    if (lane == 0) {
      ptx::mbarrier_arrive(&barriers.key_empty[keys.stage()]);
      if (last) ptx::mbarrier_arrive(&barriers.query_empty[group]);
    }
    const int first_column = lane % 4 * 2, first_key = tile.first() + first_column;
    if (rule.transforms) apply_rule<false>(rule, rows.describe(params), first_key, s);
    if (tile.is_masked()) {
      const KeyEnds* ends = &barriers.key_ends[keys.end_slot()][first_column / 2];
      mask_logits(
          rule, rows.describe(params), first_key, [&](int column) { return ends[column / 2].end[column % 2]; }, s);
    }
    ++keys.tile;
    float rescale[2];
    const bool rescales = softmax.take(rule.factor, s, rescale);
    ptx::keep_in_place(s);
    ptx::keep_in_place(softmax.sum);
    // Between the exponentials and the wait, since the compiler moves the wait up to the beginning of its block.
    const bool more = !last || next_queries();
    if (more) tile = next_tile();
    ptx::wgmma_wait<0>();
    ptx::keep_in_place(o);
    if (!first) {
      const Turn before{keys.tile - 2};
      if (lane == 0) ptx::mbarrier_arrive(&barriers.value_empty[before.stage()]);
    }
    if (rescales) {
#pragma unroll
      for (int i = 0; i < Products::kSums; ++i) o[i] *= rescale[i / 2 % 2];
    }
#pragma unroll
    for (int step = 0; step < Products::kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[step][i] = narrow_pair(s[8 * step + 2 * i], s[8 * step + 2 * i + 1], T{}).bits;
      }
      ptx::keep_in_place(weights[step]);
    }

    ptx::barrier_sync(own_turn(), 256);
    if (more) {
      ptx::keep_in_place(s);
      ptx::wgmma_fence();
      products.with_keys(s, keys.stage());
    }
    const Turn values{keys.tile - 1};
    ptx::mbarrier_wait(&barriers.value_full[values.stage()], values.parity());
    ptx::keep_in_place(o);
    ptx::wgmma_fence();
    products.with_values(o, weights, values.stage());
    ptx::barrier_arrive(other_turn(), 256);
    ptx::wgmma_wait<1>();
    ptx::keep_in_place(s);
    if (!last) continue;

    ptx::wgmma_wait<0>();
    ptx::keep_in_place(o);
    if (lane == 0) ptx::mbarrier_arrive(&barriers.value_empty[values.stage()]);
    store_forward<T>(params, rows, softmax, o);
    if (!more) break;
    rows = next_rows();
    softmax = OnlineSoftmax();
#pragma unroll
    for (int i = 0; i < Products::kSums; ++i) o[i] = 0.0f;
  }
  // The turn that the other warpgroup has given last.
  if (group == 0) ptx::barrier_sync(own_turn(), 256);
}

template <class Sizes>
__global__ void __launch_bounds__(kForwardThreads, 1)
    prefix_attention_forward_sm90_kernel(const __grid_constant__ ForwardSm90 params) {
  constexpr int kStages = ForwardTiles<Sizes>::kStages;
  PYKERN_DYNAMIC_SHARED(shared);
  PYKERN_SHARED(typename ForwardTiles<Sizes>::Barriers, barriers);
  if (threadIdx.x == 0) {
    constexpr uint32_t kWarps = 4 * kForwardGroups;
    ptx::prefetch_tensor_map(params.query_map);
    ptx::prefetch_tensor_map(params.key_map);
    ptx::prefetch_tensor_map(params.value_map);
    ptx::mbarrier_init(&barriers.value_copied, 1);
    for (int group = 0; group < kForwardGroups; ++group) {
      ptx::mbarrier_init(&barriers.query_full[group], 1);
      ptx::mbarrier_init(&barriers.query_empty[group], 4);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&barriers.key_full[stage], 2);
      ptx::mbarrier_init(&barriers.key_empty[stage], kWarps);
      ptx::mbarrier_init(&barriers.value_full[stage], 1);
      ptx::mbarrier_init(&barriers.value_empty[stage], kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::decrease_registers<56>();
    if (threadIdx.x < kWarpSize) copy_forward_tiles<Sizes>(params, shared, barriers);
  } else {
    ptx::increase_registers<224>();
    compute_forward<Sizes>(params, shared, barriers);
  }
}

}  // namespace pykern
