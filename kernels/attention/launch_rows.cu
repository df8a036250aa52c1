#include "kernels/attention/rows_sm80.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"

namespace pykern {
namespace {

// As many threads along a row as have something to do, a warp at least where the row is that long; the others of a
// block take more rows.
Grid rows_grid(int64_t rows, int64_t units, int units_per_thread) {
  int64_t across = 1;
  while (across < units && across < kWarpSize) across *= 2;
  while (across * units_per_thread < units && across < kRowsThreads) across *= 2;
  const int64_t down = kRowsThreads / across;
  const int64_t chunks = (units + across * units_per_thread - 1) / (across * units_per_thread);
  return {dim3((rows + down - 1) / down, chunks < 65535 ? chunks : 65535), dim3(across, down)};
}

template <class Unit>
const char* launch_gather(const GatherRows& params, Stream stream) {
  const int64_t units = params.row_bytes / static_cast<int64_t>(sizeof(Unit));
  return launch(gather_rows_kernel<Unit>, rows_grid(params.out_rows, units, kGatherUnits), stream, params);
}

template <class T>
const char* launch_backward(const GatherRowsBackward& params, Stream stream) {
  const T* grad_out = static_cast<const T*>(params.grad_out);
  const T* grad_source = static_cast<const T*>(params.grad_source);
  const bool packs = allows_packs(grad_out, params.grad_stride) && allows_packs(grad_source, params.columns);
  const int64_t units = packs ? params.columns / Pack<T>::kSize : params.columns;
  const Grid grid = rows_grid(params.source_rows, units, kBackwardUnits);
  return launch(packs ? gather_rows_backward_kernel<T, true> : gather_rows_backward_kernel<T, false>, grid, stream,
                params);
}

}  // namespace

const char* launch_gather_rows(const GatherRows& params, Stream stream) {
  // The widest unit at whose multiples every row begins and ends.
  const uint64_t bits = reinterpret_cast<uintptr_t>(params.source) | reinterpret_cast<uintptr_t>(params.out) |
                        static_cast<uint64_t>(params.row_bytes) | static_cast<uint64_t>(params.source_stride);
  if (bits % 16 == 0) return launch_gather<Sixteen>(params, stream);
  if (bits % 8 == 0) return launch_gather<uint64_t>(params, stream);
  if (bits % 4 == 0) return launch_gather<uint32_t>(params, stream);
  return launch_gather<uint16_t>(params, stream);
}

const char* launch_gather_rows_backward(const GatherRowsBackward& params, Stream stream) {
  return with_any_type(params.type, [&](auto value) {
    return launch_backward<decltype(value)>(params, stream);
  });
}

}  // namespace pykern
