// The two halves of the backward for 8.0 and newer, each compiled by itself.
#pragma once

#include "kernels/attention/prefix_attention.h"

namespace pykern {

const char* launch_prefix_attention_backward_keys_sm80(const PrefixAttentionBackward& params, Stream stream);
const char* launch_prefix_attention_backward_queries_sm80(const PrefixAttentionBackward& params, Stream stream);

}  // namespace pykern
