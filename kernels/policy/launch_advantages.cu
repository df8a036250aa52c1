#include "kernels/common/launch.h"
#include "kernels/policy/advantages_general_sm80.cuh"
#include "kernels/policy/advantages_sm80.cuh"
#include "kernels/policy/group_entropy_sm80.cuh"

namespace pykern {
namespace {

// Small batches take few blocks and threads: all of them wait for each other several times.
Grid grid_of(int64_t rows, int64_t most_threads, int64_t row_bytes) {
  constexpr int64_t kBlockRows = 128, kThreadRows = 8;
  const int64_t wanted_blocks = (rows + kBlockRows - 1) / kBlockRows, most = multiprocessors();
  const int64_t wanted_threads = (rows / kThreadRows + kWarpSize - 1) / kWarpSize * kWarpSize;
  const int64_t threads = wanted_threads < 64             ? 64
                          : wanted_threads < most_threads ? wanted_threads
                                                          : most_threads;
  return {dim3(static_cast<unsigned>(wanted_blocks < most ? wanted_blocks : most)),
          dim3(static_cast<unsigned>(threads)), static_cast<size_t>(kSharedGroupRows * row_bytes)};
}

template <class T>
const char* launch_of_type(const AdvantageParams& params, Stream stream) {
  if (is_plain(params)) {
    return launch(plain_advantages_kernel<T>, grid_of(params.rows, kAdvantageThreads, kPlainRowBytes), stream, params);
  }
  const Grid grid = grid_of(params.rows, kGeneralThreads, kAdvantageRowBytes);
  AdvantageParams call = params;
  if (params.filter != Filter::none) {
    call.stage = AdvantageStage::filter;
    const char* error = launch(general_advantages_kernel<T>, grid, stream, call);
    if (error) return error;
    call.stage = AdvantageStage::after_filter;
  }
  return launch(general_advantages_kernel<T>, grid, stream, call);
}

}  // namespace

const char* launch_group_advantages(DataType type, const AdvantageParams& params, Stream stream) {
  switch (type) {
    case DataType::f32: return launch_of_type<float>(params, stream);
    case DataType::f64: return launch_of_type<double>(params, stream);
    default: return "group_advantages: rewards of this dtype have no kernel";
  }
}

const char* launch_group_entropy(const EntropyParams& params, Stream stream) {
  return launch(group_entropy_kernel, grid_of(params.rows, kEntropyThreads, kEntropyRowBytes), stream, params);
}

}  // namespace pykern
