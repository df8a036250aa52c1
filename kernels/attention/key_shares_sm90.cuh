// The longest tiles of keys, shared out among blocks.
//
// The keys of a prompt are seen by all that follows them: a few tiles may hold most of the work. A tile among the
// longest, of which there are too few to keep every multiprocessor busy, is given to several blocks, each for a run of
// its queries. Their sums in float32 meet in a workspace, where a second kernel adds them up in order.
#pragma once

#include "kernels/attention/backward_sm90.cuh"

namespace pykern {

constexpr int kKeyShares = 8;  // of a tile at most
// Queries of a share at least; few on the emulator, whose tests are small.
constexpr int kLeastShare = kEmulated ? 64 : 512;

// Tokens from the first key of a block of the order to the last query that sees one.
__device__ __forceinline__ int reach_of(const PrefixAttentionBackward& params, int block) {
  const int first = block * kOrderTokens;
  const int reach = token_bounds(params, first, first + kOrderTokens).last_end - first;
  return reach > 0 ? reach : 0;
}

// How many blocks share the tile of this rank in the order. None is longer then than the first that is not shared out.
__device__ __forceinline__ int shares_of(const PrefixAttentionBackwardSm90& call, int rank) {
  const PrefixAttentionBackward& params = call.params;
  const int blocks = static_cast<int>((params.tokens + kOrderTokens - 1) / kOrderTokens);
  int limit = call.shared_blocks < blocks ? reach_of(params, params.key_order[call.shared_blocks]) : 0;
  limit = limit > kLeastShare ? limit : kLeastShare;
  const int shares = reach_of(params, params.key_order[rank]) / limit;
  return shares < 1 ? 1 : shares < kKeyShares ? shares : kKeyShares;
}

// Row `row` of a share of a block of the order: the gradient of a key, then that of its value.
__device__ __forceinline__ float* row_of_share(const PrefixAttentionBackward& params, int rank, int key_head, int share,
                                               int row) {
  const int64_t index = (int64_t{rank} * params.key_heads + key_head) * kKeyShares + share;
  return params.key_shares + (index * kOrderTokens + row) * (params.key_size + params.value_size);
}

// A warpgroup's accumulators [64][columns], of which the tensor has `size` columns; `rows` is the first of 64 rows.
template <int columns>
__device__ __forceinline__ void store_share(float* rows, int pitch, int size, const float (&d)[columns / 2]) {
  struct alignas(8) Two {
    float values[2];
  };
  const int thread = threadIdx.x % 128, row = thread / kWarpSize * 16 + thread % kWarpSize / 4;
#pragma unroll
  for (int j = 0; j < columns / 8; ++j) {
    if (8 * j >= size) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* target = rows + int64_t{row + 8 * i} * pitch + 8 * j + thread % 4 * 2;
      *reinterpret_cast<Two*>(target) = Two{{d[4 * j + 2 * i], d[4 * j + 2 * i + 1]}};
    }
  }
}

constexpr int kJoinThreads = 256, kJoinRows = 32;

// A block for 32 keys of one key head of a block of the order.
template <class T>
__global__ void __launch_bounds__(kJoinThreads)
    prefix_attention_join_shares_sm90_kernel(const __grid_constant__ PrefixAttentionBackwardSm90 call) {
  constexpr int kSize = Pack<T>::kSize;
  const PrefixAttentionBackward& params = call.params;
  const int rank = static_cast<int>(blockIdx.x) / params.key_heads;
  const int key_head = static_cast<int>(blockIdx.x) % params.key_heads;
  const int shares = shares_of(call, rank);
  if (shares == 1) return;
  const int packs = (params.key_size + params.value_size) / kSize;
  for (int i = threadIdx.x; i < kJoinRows * packs; i += kJoinThreads) {
    const int row = static_cast<int>(blockIdx.y) * kJoinRows + i / packs, column = i % packs * kSize;
    const int64_t key = int64_t{params.key_order[rank]} * kOrderTokens + row;
    if (key >= params.tokens) break;
    float sums[kSize] = {};
    for (int share = 0; share < shares; ++share) {
      const float* source = row_of_share(params, rank, key_head, share, row) + column;
#pragma unroll
      for (int part = 0; part < kSize / 4; ++part) {
        const Pack<float> pack = load_pack<Reuse::stream>(source + 4 * part);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[4 * part + j] += pack[j];
      }
    }
    const bool of_key = column < params.key_size, seen = params.subtree_end[key] > key;
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < kSize; ++j) narrow(seen ? of_key ? sums[j] * params.scale : sums[j] : 0.0f, pack[j]);
    const int64_t index = key * params.key_heads + key_head;
    T* target = of_key ? static_cast<T*>(params.grad_k) + index * params.key_size + column
                       : static_cast<T*>(params.grad_v) + index * params.value_size + column - params.key_size;
    store_pack(target, pack);
  }
}

}  // namespace pykern
