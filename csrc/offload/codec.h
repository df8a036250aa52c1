// Encoding and decoding on the CPU: `count` elements that begin at a multiple of kScaleBlock, bfloat16, float16 or
// float32.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "kernels/offload/staging.h"

namespace pykern {

PYKERN_SIMD_FUNCTION(void, staging_encode, (StagingCodec codec, DataType type, const void* source, int64_t count,
                                            uint8_t* codes, float* scales))
PYKERN_SIMD_FUNCTION(void, staging_decode, (StagingCodec codec, DataType type, const uint8_t* codes,
                                            const float* scales, int64_t count, void* target))

}  // namespace pykern
