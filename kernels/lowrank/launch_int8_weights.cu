#include "kernels/common/launch.h"
#include "kernels/lowrank/int8_weights_sm80.cuh"

namespace pykern::lowrank {

const char* launch_int8_weights(const Int8WeightParams& params, Stream stream) {
  const int64_t groups = params.rows * affine_groups(params.columns);
  const Grid grid{dim3(static_cast<unsigned>((groups + kAffineWarps - 1) / kAffineWarps)), dim3(kAffineThreads)};
  // A lane's eight elements then have the bits of one draw.
  const bool packs = params.columns % kGroupValues == 0 && allows_packs(params.update) &&
                     reinterpret_cast<uintptr_t>(params.codes) % kGroupValues == 0;
  return packs ? launch(int8_weights_kernel<true>, grid, stream, params)
               : launch(int8_weights_kernel<false>, grid, stream, params);
}

}  // namespace pykern::lowrank
