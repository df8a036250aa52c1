// Bounds of a tree's tiles and the order of its blocks, on CUDA.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention/arguments.h"
#include "common/cuda.h"
#include "kernels/attention/tiles.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor> tiles(Tensor subtree_end, Tensor position) {
  check_tokens(subtree_end, "subtree_end", cuda::check_device);
  check_tokens(position, "position", cuda::check_device);
  const int64_t tokens = subtree_end.size(0);
  check_size(position, 0, tokens, "position");
  const cuda::DeviceGuard guard(subtree_end);
  const int64_t blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
  Tensor bounds = cuda::empty(subtree_end, {(tokens + kTileTokens - 1) / kTileTokens, 4}, ScalarType::Int);
  Tensor order = cuda::empty(subtree_end, {2, blocks}, ScalarType::Int);
  if (tokens == 0) return {bounds, order};
  Tensor work = cuda::empty(subtree_end, {2, blocks}, ScalarType::Int);
  const PrefixAttentionTiles params{cuda::input<int32_t>(subtree_end), cuda::input<int32_t>(position),
                                    cuda::output<int32_t>(bounds),     cuda::workspace<int32_t>(work),
                                    cuda::output<int32_t>(order),      tokens};
  cuda::check_launch(launch_prefix_attention_tiles(params, cuda::current_stream(subtree_end)),
                     "prefix_attention_tiles");
  return {bounds, order};
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("prefix_attention_tiles", TORCH_BOX(&tiles)); }

}  // namespace pykern
