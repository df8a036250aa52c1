// A kernel with a known fault, for the tests of tests/packaging/budgets.py.
#include "kernels/common/launch.h"
#include "kernels/ptx/sm90.cuh"

namespace pykern {
namespace {

// Products are under way, and one of their registers is touched.
template <bool early>
__global__ void __launch_bounds__(128) touches(const float* source, float* target) {
  float sums[32];
  for (int i = 0; i < 32; ++i) sums[i] = source[i];
  ptx::keep_in_place(sums);
  ptx::wgmma_fence();
  ptx::wgmma<bf16>(sums, uint64_t{1}, uint64_t{2}, true);
  ptx::wgmma_commit();
  if (early) sums[0] += 1.0f;
  ptx::wgmma_wait<0>();
  ptx::keep_in_place(sums);
  for (int i = 0; i < 32; ++i) target[i * 128 + threadIdx.x] = sums[i];
}

}  // namespace

const char* launch_planted(float* data, Stream stream) {
  const Grid grid{dim3(1), dim3(128)};
  const char* const error = launch(touches<false>, grid, stream, data, data);
  return error ? error : launch(touches<true>, grid, stream, data, data);
}

}  // namespace pykern
