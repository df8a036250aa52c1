// Three small kernels: bounds of tiles, work of blocks, rank of blocks. A warp, a warp and a thread for each.
#pragma once

#include "kernels/attention/tiles.h"
#include "kernels/common/reduce.cuh"

namespace pykern {

constexpr int kTilesWarps = 4;

__global__ void __launch_bounds__(kTilesWarps * kWarpSize) prefix_attention_bounds_kernel(PrefixAttentionTiles params) {
  constexpr int kTokens = PrefixAttentionTiles::kTileTokens;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t tile = int64_t{blockIdx.x} * kTilesWarps + threadIdx.x / kWarpSize;
  const int64_t first = tile * kTokens;
  if (first >= params.tokens) return;
  const int64_t stop = first + kTokens < params.tokens ? first + kTokens : params.tokens;
  int32_t least_end = INT32_MAX, last_end = 0, least_position = INT32_MAX, last_position = INT32_MIN;
  for (int64_t key = first + lane; key < stop; key += kWarpSize) {
    const int32_t end = params.subtree_end[key], position = params.position[key];
    const int32_t seen = end > key ? end : 0;
    least_end = seen < least_end ? seen : least_end;
    last_end = seen > last_end ? seen : last_end;
    least_position = position < least_position ? position : least_position;
    last_position = position > last_position ? position : last_position;
  }
  least_end = __reduce_min_sync(kFullWarp, least_end);
  last_end = __reduce_max_sync(kFullWarp, last_end);
  least_position = __reduce_min_sync(kFullWarp, least_position);
  last_position = __reduce_max_sync(kFullWarp, last_position);
  if (lane == 0) {
    params.bounds[4 * tile] = least_end;
    params.bounds[4 * tile + 1] = last_end;
    params.bounds[4 * tile + 2] = least_position;
    params.bounds[4 * tile + 3] = last_position;
  }
}

__global__ void __launch_bounds__(kTilesWarps * kWarpSize) prefix_attention_work_kernel(PrefixAttentionTiles params) {
  constexpr int kTokens = PrefixAttentionTiles::kBlockTokens;
  constexpr int kTiles = kTokens / PrefixAttentionTiles::kTileTokens;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t block = int64_t{blockIdx.x} * kTilesWarps + threadIdx.x / kWarpSize;
  const int64_t blocks = (params.tokens + kTokens - 1) / kTokens, first = block * kTokens;
  if (block >= blocks) return;
  const int64_t tiles = (params.tokens + PrefixAttentionTiles::kTileTokens - 1) / PrefixAttentionTiles::kTileTokens;
  const int64_t stop = (block + 1) * kTiles < tiles ? (block + 1) * kTiles : tiles;
  int32_t seen = 0, last_end = 0;
  for (int64_t tile = lane; tile < stop; tile += kWarpSize) {
    const int32_t end = params.bounds[4 * tile + 1];
    seen += end > first;
    if (tile >= block * kTiles && end > last_end) last_end = end;
  }
  seen = __reduce_add_sync(kFullWarp, seen);
  last_end = __reduce_max_sync(kFullWarp, last_end);
  if (lane == 0) {
    params.work[block] = seen;
    params.work[blocks + block] = last_end > first ? static_cast<int32_t>(last_end - first) : 0;
  }
}

// A block's rank is the number of those that come before it; equal work keeps its order.
__global__ void __launch_bounds__(kTilesWarps * kWarpSize) prefix_attention_order_kernel(PrefixAttentionTiles params) {
  const int64_t blocks = (params.tokens + PrefixAttentionTiles::kBlockTokens - 1) / PrefixAttentionTiles::kBlockTokens;
  const int64_t block = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (block >= blocks) return;
  const int32_t* work = params.work + blockIdx.y * blocks;
  const int32_t own = work[block];
  int64_t rank = 0;
  for (int64_t other = 0; other < blocks; ++other) rank += work[other] > own || (work[other] == own && other < block);
  params.order[blockIdx.y * blocks + rank] = static_cast<int32_t>(block);
}

}  // namespace pykern
