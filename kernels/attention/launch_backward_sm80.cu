#include "kernels/attention/launch_backward_sm80.h"

namespace pykern {

const char* launch_prefix_attention_backward_sm80(const PrefixAttentionBackward& params, Stream stream) {
  if (const char* error = launch_prefix_attention_backward_keys_sm80(params, stream)) return error;
  return launch_prefix_attention_backward_queries_sm80(params, stream);
}

}  // namespace pykern
