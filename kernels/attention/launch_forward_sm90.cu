#include "kernels/attention/prefix_attention.h"

namespace pykern {

const char* launch_prefix_attention_forward_sm90(const PrefixAttentionForward&, Stream) { return "not there yet"; }

}  // namespace pykern
