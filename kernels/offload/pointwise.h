// Element by element: gated activation functions, and dropout whose mask is a function of a seed.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"
#include "kernels/offload/activation_math.h"

namespace pykern {

// y = f(gate) * up, or f(gate) where there is no `up`. With `grad`: gate_out and up_out are the gradients instead.
struct ActivationParams {
  const void *gate, *up, *grad;
  void *gate_out, *up_out;  // y is gate_out of the forward
  int64_t count;
  Activation kind;
};

// y = x * scale where the element's word is at least `threshold`, else 0: the words of element i are those of Philox's
// counter (i / 4, 0, 0), one for each element.
struct DropoutParams {
  const void* x;
  void* y;
  const int64_t* seed;
  int64_t count;
  uint64_t threshold;
  float scale;
};

const char* launch_activation(DataType type, const ActivationParams& params, Stream stream);
const char* launch_dropout(DataType type, const DropoutParams& params, Stream stream);

}  // namespace pykern
