#include "kernels/attention/delta_sm80.cuh"
#include "kernels/common/launch.h"

namespace pykern {

const char* launch_prefix_attention_delta(const PrefixAttentionBackward& params, Stream stream) {
  const int64_t blocks = (params.tokens + kOrderTokens - 1) / kOrderTokens * params.query_heads;
  const Grid grid{dim3(static_cast<unsigned>(blocks)), dim3(kDeltaThreads)};
  const auto kernel =
      params.type == DataType::bf16 ? prefix_attention_delta_kernel<bf16> : prefix_attention_delta_kernel<f16>;
  const char* error = launch(kernel, grid, stream, params);
  if (error || !params.sinks) return error;
  const Grid heads{dim3(static_cast<unsigned>(params.query_heads)), dim3(kSinksThreads)};
  return launch(prefix_attention_sinks_kernel, heads, stream, params);
}

}  // namespace pykern
