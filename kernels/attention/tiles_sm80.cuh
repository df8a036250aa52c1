// One warp reads one tile of keys.
#pragma once

#include "kernels/attention/tiles.h"
#include "kernels/common/vector.cuh"

namespace pykern {

constexpr int kTilesWarps = 4;

// With packs every tile begins at a multiple of sixteen bytes.
template <bool packs>
__global__ void __launch_bounds__(kTilesWarps * kWarpSize) prefix_attention_tiles_kernel(PrefixAttentionTiles params) {
  constexpr int kKeys = packs ? Pack<int32_t>::kSize : 1;  // that a lane reads at once
  const int lane = threadIdx.x % kWarpSize;
  const int64_t tile = int64_t{blockIdx.x} * kTilesWarps + threadIdx.x / kWarpSize;
  const int64_t first = tile * params.tile;
  if (first >= params.tokens) return;
  const int64_t stop = first + params.tile < params.tokens ? first + params.tile : params.tokens;

  int32_t smallest = INT32_MAX, largest = 0;
  const auto count = [&](int64_t key, int32_t end) {
    const int32_t seen = end > key ? end : 0;
    smallest = seen < smallest ? seen : smallest;
    largest = seen > largest ? seen : largest;
  };
  for (int64_t key = first + lane * kKeys; key < stop; key += kWarpSize * kKeys) {
    if (packs && key + kKeys <= stop) {
      const Pack<int32_t> ends = load_pack(params.subtree_end + key);
#pragma unroll
      for (int i = 0; i < kKeys; ++i) count(key + i, ends[i]);
    } else {
      for (int i = 0; i < kKeys && key + i < stop; ++i) count(key + i, params.subtree_end[key + i]);
    }
  }
  smallest = __reduce_min_sync(kFullWarp, smallest);
  largest = __reduce_max_sync(kFullWarp, largest);
  if (lane == 0) {
    params.bounds[2 * tile] = smallest;
    params.bounds[2 * tile + 1] = largest;
  }
}

}  // namespace pykern
