// The sparse rows on the CPU. No torch header here.
#pragma once

#include "common/cpu_level.h"
#include "kernels/lowrank/sparse_rows.h"

namespace pykern {

PYKERN_SIMD_FUNCTION(void, sparse_rows, (const lowrank::SparseRows& rows))

}  // namespace pykern
