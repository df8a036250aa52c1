#include "kernels/common/launch.h"
#include "kernels/lowrank/int8_weights_sm80.cuh"

namespace pykern::lowrank {

const char* launch_int8_weights(const Int8WeightParams& params, Stream stream) {
  constexpr int64_t kResident = 8;
  const int64_t groups = params.rows * affine_groups(params.columns);
  const int64_t wanted = (groups + kAffineWarps - 1) / kAffineWarps, most = int64_t{multiprocessors()} * kResident;
  const Grid grid{dim3(static_cast<unsigned>(wanted < most ? wanted : most)), dim3(kAffineThreads)};
  // The first element of the matrix has index 0, and a lane's eight have the words of two whole counters.
  const bool packs = params.columns % kGroupValues == 0 && allows_packs(params.update) &&
                     reinterpret_cast<uintptr_t>(params.codes) % kGroupValues == 0;
  return packs ? launch(int8_weights_kernel<true>, grid, stream, params)
               : launch(int8_weights_kernel<false>, grid, stream, params);
}

}  // namespace pykern::lowrank
