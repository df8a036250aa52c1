#include "kernels/attention/forward_sm80.cuh"
#include "kernels/common/launch.h"

namespace pykern {
namespace {

const char* find_paths(const PrefixAttentionForward& params, Stream stream) {
  constexpr int kTokens = kPathsWarps * kWarpSize;
  const auto blocks = static_cast<unsigned>((params.tokens + kTokens - 1) / kTokens);
  return launch(prefix_attention_paths_kernel, {dim3(blocks), dim3(kTokens)}, stream, params, params.paths);
}

}  // namespace

const char* launch_prefix_attention_forward_sm80(const PrefixAttentionForward& params, Stream stream) {
  if (params.paths) {
    if (const char* error = find_paths(params, stream)) return error;
  }
  const int64_t blocks = (params.tokens + kOrderTokens - 1) / kOrderTokens * params.query_heads;
  if (blocks > INT32_MAX) return "the product of tokens and query heads is at most 2^38";
  return with_head_sizes(params, [&](auto sizes) {
    using Sizes = decltype(sizes);
    using Tiling = ForwardTiling<Sizes>;
    const Grid grid{dim3(static_cast<unsigned>(blocks)), dim3(Tiling::kThreads), Tiling::kSharedBytes};
    return params.paths ? launch(prefix_attention_forward_kernel<Sizes, true>, grid, stream, params)
                        : launch(prefix_attention_forward_kernel<Sizes, false>, grid, stream, params);
  });
}

}  // namespace pykern
