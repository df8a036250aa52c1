// Kernels with a known fault each, for the tests of tests/packaging/budgets.py.
#include "kernels/common/launch.h"

namespace pykern {
namespace {

struct Row {
  float values[64];
};

template <class T, int kFactor>
__global__ void doubles(const T* source, T* target, int count) {
  PYKERN_SHARED(Row, shared);
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += source[i] * 1.5;
  shared.values[threadIdx.x] = static_cast<float>(sum) * kFactor;
  __syncthreads();
  target[threadIdx.x] = shared.values[count];
}

// A hundred live values, thirty-two registers.
__global__ void __launch_bounds__(1024, 2) spills(const float* source, float* target, int stride) {
  float values[100];
  for (int i = 0; i < 100; ++i) values[i] = source[i * stride];
  __syncthreads();
  for (int i = 0; i < 100; ++i) target[i * stride] = values[i] * values[99 - i];
}

}  // namespace

const char* launch_planted(float* data, Stream stream) {
  const Grid grid{dim3(1), dim3(64)};
  const char* const error = launch(doubles<float, 3>, grid, stream, data, data, 64);
  return error != nullptr ? error : launch(spills, grid, stream, data, data, 64);
}

}  // namespace pykern
