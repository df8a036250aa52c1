#include "kernels/common/launch.h"
#include "kernels/policy/advantages_sm80.cuh"

namespace pykern {

const char* launch_group_advantages(DataType type, const AdvantageParams& params, Stream stream) {
  // Small batches take few blocks and threads: all of them wait for each other several times.
  constexpr int64_t kBlockRows = 128, kThreadRows = 8;
  const int64_t wanted_blocks = (params.rows + kBlockRows - 1) / kBlockRows, most = multiprocessors();
  const int64_t wanted_threads = (params.rows / kThreadRows + kWarpSize - 1) / kWarpSize * kWarpSize;
  const int64_t threads = wanted_threads < 64                  ? 64
                          : wanted_threads < kAdvantageThreads ? wanted_threads
                                                               : kAdvantageThreads;
  const Grid grid{dim3(static_cast<unsigned>(wanted_blocks < most ? wanted_blocks : most)),
                  dim3(static_cast<unsigned>(threads)), kSharedGroupRows * kGroupRowBytes};
  switch (type) {
    case DataType::f32: return launch(group_advantages_kernel<float>, grid, stream, params);
    case DataType::f64: return launch(group_advantages_kernel<double>, grid, stream, params);
    default: return "group_advantages: rewards of this dtype have no kernel";
  }
}

}  // namespace pykern
