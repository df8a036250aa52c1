#include "kernels/attention/backward_keys_sm80.cuh"
#include "kernels/attention/head_sizes.h"
#include "kernels/attention/launch_backward_sm80.h"
#include "kernels/common/launch.h"

namespace pykern {

const char* launch_prefix_attention_backward_keys_sm80(const PrefixAttentionBackward& params, Stream stream) {
  return with_head_sizes(params, [&](auto sizes) {
    using Tile = BackwardKeys<decltype(sizes)>;
    const int64_t blocks = (params.tokens + kOrderTokens - 1) / kOrderTokens * (kOrderTokens / Tile::kKeys);
    const Grid grid{dim3(static_cast<unsigned>(blocks * params.key_heads)), dim3(Tile::kThreads), Tile::kSharedBytes};
    return launch(prefix_attention_backward_keys_kernel<decltype(sizes)>, grid, stream, params);
  });
}

}  // namespace pykern
