#include "kernels/attention/prefix_attention.h"

namespace pykern {

const char* launch_prefix_attention_forward_sm80(const PrefixAttentionForward&, Stream) { return "not there yet"; }

}  // namespace pykern
