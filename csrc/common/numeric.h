// Storage types. No torch header here: *.simd.cpp files include this one.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"

// For small functions outside a level's namespace that *.simd.cpp files call: were one of them left
// out of line, the linker could keep its AVX-512 copy for every caller.
#define PYKERN_INLINE inline __attribute__((always_inline))
