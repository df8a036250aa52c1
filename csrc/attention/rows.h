// The gradient of gathered rows on the CPU. Parameters are those of the CUDA kernels.
#pragma once

#include "common/cpu_level.h"
#include "kernels/attention/rows.h"

namespace pykern {

// Every type but float64.
PYKERN_SIMD_FUNCTION(void, gather_rows_backward, (const GatherRowsBackward& params))

}  // namespace pykern
