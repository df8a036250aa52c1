// Which kernels a call of prefix attention runs on.
#include "kernels/attention/prefix_attention.h"
#include "kernels/common/launch.h"

namespace pykern {

const char* launch_prefix_attention_forward(const PrefixAttentionForward& params, Stream stream) {
#if defined(PYKERN_HAS_SM90)
  // Keys along a path are gathered row by row, which tensor copies can't.
  if (compute_capability() == 90 && !params.paths) return launch_prefix_attention_forward_sm90(params, stream);
#endif
  return launch_prefix_attention_forward_sm80(params, stream);
}

int64_t prefix_attention_key_shares(const PrefixAttentionBackward& params) {
#if defined(PYKERN_HAS_SM90)
  if (compute_capability() == 90) return prefix_attention_key_shares_sm90(params);
#else
  (void)params;
#endif
  return 0;
}

const char* launch_prefix_attention_backward(const PrefixAttentionBackward& params, Stream stream) {
  if (const char* error = launch_prefix_attention_delta(params, stream)) return error;
#if defined(PYKERN_HAS_SM90)
  if (compute_capability() == 90) return launch_prefix_attention_backward_sm90(params, stream);
#endif
  return launch_prefix_attention_backward_sm80(params, stream);
}

}  // namespace pykern
