#include "kernels/attention/tiles_sm80.cuh"
#include "kernels/common/launch.h"

namespace pykern {

const char* launch_prefix_attention_tiles(const PrefixAttentionTiles& params, Stream stream) {
  const int64_t tiles = (params.tokens + params.tile - 1) / params.tile;
  const Grid grid{dim3((tiles + kTilesWarps - 1) / kTilesWarps), dim3(kTilesWarps * kWarpSize)};
  const bool packs = allows_packs(params.subtree_end, params.tile);
  return launch(packs ? prefix_attention_tiles_kernel<true> : prefix_attention_tiles_kernel<false>, grid, stream,
                params);
}

}  // namespace pykern
