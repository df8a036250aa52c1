#include "kernels/attention/tiles_sm80.cuh"
#include "kernels/common/launch.h"

namespace pykern {

const char* launch_prefix_attention_tiles(const PrefixAttentionTiles& params, Stream stream) {
  constexpr int kThreads = kTilesWarps * kWarpSize;
  const auto grid = [](int64_t tasks, int64_t tasks_per_block, unsigned rows) {
    return Grid{dim3(static_cast<unsigned>((tasks + tasks_per_block - 1) / tasks_per_block), rows), dim3(kThreads)};
  };
  const int64_t tiles = (params.tokens + PrefixAttentionTiles::kTileTokens - 1) / PrefixAttentionTiles::kTileTokens;
  const int64_t blocks = (params.tokens + PrefixAttentionTiles::kBlockTokens - 1) / PrefixAttentionTiles::kBlockTokens;
  const char* error = launch(prefix_attention_bounds_kernel, grid(tiles, kTilesWarps, 1), stream, params);
  if (!error) error = launch(prefix_attention_work_kernel, grid(blocks, kTilesWarps, 1), stream, params);
  if (!error) error = launch(prefix_attention_order_kernel, grid(blocks, kThreads, 2), stream, params);
  return error;
}

}  // namespace pykern
