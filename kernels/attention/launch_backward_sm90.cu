#include "kernels/attention/prefix_attention.h"

namespace pykern {

const char* launch_prefix_attention_backward_sm90(const PrefixAttentionBackward&, Stream) { return "not there yet"; }

}  // namespace pykern
