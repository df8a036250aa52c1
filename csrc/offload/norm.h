// Norms of rows on the CPU: float32, bfloat16 and float16 by vectors.
#pragma once

#include "common/cpu_level.h"
#include "kernels/offload/norm.h"

namespace pykern {

PYKERN_SIMD_FUNCTION(void, norm_rows, (DataType type, const NormParams& params, int64_t begin, int64_t end))
// The rows' part of the sums of columns goes to `sums`, [wanted, stride], with `stride` a multiple of 16.
PYKERN_SIMD_FUNCTION(void, norm_backward_rows, (DataType type, const NormBackwardParams& params, int64_t begin,
                                                int64_t end, float* sums, int64_t stride))
// target = the sum over `parts` of parts[.., columns], which lie `stride` apart.
PYKERN_SIMD_FUNCTION(void, norm_sum_parts, (DataType type, const float* parts, int64_t count, int64_t stride,
                                            int64_t columns, void* target))

}  // namespace pykern
