// How floats become operands of a product in the weight's type.
#pragma once

#include "kernels/common/device.h"

namespace pykern::lowrank {

// A product has operands of the weight's type. bf16 holds whatever a float does; for f16 the direction's columns of a
// tile are multiplied by a power of two that brings the largest finite one to 2^14.
template <class T>
struct OperandScale {
  float factor = 1, inverse = 1;

  __device__ __forceinline__ void fit(float largest) {
    if (!std::is_same<T, f16>::value) return;
    if (largest == 0) return;
    const unsigned wanted = 268 - (__float_as_uint(largest) >> 23), scale = wanted < 253 ? wanted : 253;
    factor = __uint_as_float(scale << 23);
    inverse = __uint_as_float((254 - scale) << 23);
  }
};

}  // namespace pykern::lowrank
