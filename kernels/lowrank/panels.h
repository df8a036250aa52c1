// Tiles of matrices in shared memory as tensor copies bring them and wgmma reads them: panels of 64 elements of
// 16 bits by all rows, one behind the other. Plain C++: what the host has to know of them.
#pragma once

#include "kernels/common/numeric.h"

namespace pykern::lowrank {

// What the swizzle of 128 bytes spans.
constexpr int kPanelElements = 64, kPanelRowBytes = 128;

// Whether there is a tensor map of a matrix whose rows of `columns` elements begin `stride` elements apart.
inline bool allows_panels(const void* data, int64_t stride, int64_t rows, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows > 0 && columns > 0 && stride % 8 == 0 &&
         stride >= columns && stride < int64_t{1} << 38;
}

}  // namespace pykern::lowrank
