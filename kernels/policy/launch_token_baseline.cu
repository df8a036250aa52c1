#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/token_baseline_sm80.cuh"

namespace pykern {
namespace {

Grid grid_of(int64_t blocks) { return {dim3(static_cast<unsigned>(blocks)), dim3(kBaselineThreads)}; }

template <class T>
const char* launch_baseline(const TokenBaselineParams& p, Stream stream) {
  bool packs = reinterpret_cast<uintptr_t>(p.mask) % kQuad == 0 && p.columns % kQuad == 0;
  for (const void* pointer : {p.returns, p.logprobs, p.sum_p2, p.weights, static_cast<const void*>(p.advantages)}) {
    packs = packs && allows_packs(static_cast<const T*>(pointer));
  }
  constexpr int64_t kBlockRows = kBaselineThreads / kWarpSize;
  const char* error = launch(link_rows_kernel, grid_of((p.rows + kBlockRows - 1) / kBlockRows), stream, p);
  if (!error) error = launch(measure_rows_kernel<T>, grid_of(p.rows), stream, p, packs);
  if (!error) error = launch(token_baseline_kernel<T>, grid_of(p.rows * p.tiles), stream, p, packs);
  return error;
}

}  // namespace

const char* launch_token_baseline(DataType type, const TokenBaselineParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_baseline<decltype(value)>(params, stream); });
}

}  // namespace pykern
