// The processor's own matrix rate, as the bench's arithmetic limit.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace pykern {

// Multiplies matrices that stay in cache `repeats` times on every thread; returns the operations done.
PYKERN_SIMD_FUNCTION(double, matmul_in_cache, (bool bfloat16, int64_t repeats))

}  // namespace pykern
