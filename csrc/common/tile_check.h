// One small product on the tile registers, tried before the amx level is first chosen.
#pragma once

#include "common/cpu_level.h"

namespace pykern {

// False where the level multiplies on tiles and they give a wrong result.
PYKERN_SIMD_FUNCTION(bool, tiles_work, ())

}  // namespace pykern
