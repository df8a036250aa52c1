#include "kernels/attention/backward_queries_sm80.cuh"
#include "kernels/attention/head_sizes.h"
#include "kernels/attention/launch_backward_sm80.h"
#include "kernels/common/launch.h"

namespace pykern {

const char* launch_prefix_attention_backward_queries_sm80(const PrefixAttentionBackward& params, Stream stream) {
  return with_head_sizes(params, [&](auto sizes) {
    using Tile = BackwardQueries<decltype(sizes)>;
    const int64_t tokens = (params.tokens + kOrderTokens - 1) / kOrderTokens * kOrderTokens;
    const int64_t blocks = tokens * params.query_heads / Tile::kQueries;
    const Grid grid{dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads), Tile::kSharedBytes};
    return launch(prefix_attention_backward_queries_kernel<decltype(sizes)>, grid, stream, params);
  });
}

}  // namespace pykern
