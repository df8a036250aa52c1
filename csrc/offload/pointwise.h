// Activation functions and dropout on the CPU: float32, bfloat16 and float16 by vectors.
#pragma once

#include "common/cpu_level.h"
#include "kernels/offload/pointwise.h"

namespace pykern {

PYKERN_SIMD_FUNCTION(void, activation_elements, (DataType type, const ActivationParams& params, int64_t begin,
                                                 int64_t end))
// `begin` is a multiple of 64.
PYKERN_SIMD_FUNCTION(void, dropout_elements, (DataType type, const DropoutParams& params, int64_t begin, int64_t end))

}  // namespace pykern
