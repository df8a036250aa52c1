// Bounds of subtree_end over tiles of keys, on CUDA.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/cuda.h"
#include "kernels/attention/tiles.h"

namespace pykern {
namespace {

Tensor tiles(Tensor subtree_end, int64_t tile) {
  cuda::check_device(subtree_end, "subtree_end");
  check_type(subtree_end, ScalarType::Int, "subtree_end");
  check_dim(subtree_end, 1, "subtree_end");
  check_contiguous(subtree_end, "subtree_end");
  STD_TORCH_CHECK(tile > 0, "tile: expected at least 1, got ", tile);
  const cuda::DeviceGuard guard(subtree_end);
  const int64_t tokens = subtree_end.size(0);
  Tensor bounds = cuda::empty(subtree_end, {tokens / tile + (tokens % tile != 0), 2}, ScalarType::Int);
  if (tokens == 0) return bounds;
  // One tile of all tokens is what a larger one means, and its borders don't overflow.
  const PrefixAttentionTiles params{cuda::input<int32_t>(subtree_end), cuda::output<int32_t>(bounds), tokens,
                                    std::min(tile, tokens)};
  cuda::check_launch(launch_prefix_attention_tiles(params, cuda::current_stream(subtree_end)),
                     "prefix_attention_tiles");
  return bounds;
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("prefix_attention_tiles", TORCH_BOX(&tiles)); }

}  // namespace pykern
