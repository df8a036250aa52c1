// What the vendor's products leave of a projection of float32 or float64: squares of columns, scale and sign.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/lowrank/project_sm80.cuh"

namespace pykern::lowrank {

constexpr int kSquareColumns = kWarpSize;  // of a block, where the rows of G lie along memory

template <class T>
struct SquareParts {
  T values[kProjectWarps][kSquareColumns];
};

// A lane takes a column and the warps share the rows; or a warp takes a column that lies along memory.
template <class T, bool along_length>
__global__ void __launch_bounds__(kProjectThreads) wide_squares_kernel(const __grid_constant__ ProjectCall call) {
  const int index = call.table.find(blockIdx.x);
  const ProjectMatrix& m = call.table.matrix[index];
  const int64_t tile = blockIdx.x - call.table.first_tile[index];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const T* const matrix = static_cast<const T*>(m.matrix);
  T* const squares = static_cast<T*>(m.squares);
  const T factor = call.grad_scale ? T(1) / (T(*call.grad_scale) * T(*call.grad_scale)) : T(1);
  T sum = 0;
  if (along_length) {
    PYKERN_SHARED(SquareParts<T>, parts);
    const int64_t column = tile * kSquareColumns + lane;
    if (column < m.length) {
#pragma unroll 8
      for (int64_t row = warp; row < m.n; row += kProjectWarps) {
        const T value = matrix[row * m.stride + column];
        sum += value * value;
      }
    }
    parts.values[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= m.length) return;
    sum = 0;
#pragma unroll
    for (int w = 0; w < kProjectWarps; ++w) sum += parts.values[w][lane];
    squares[column] = factor * sum;
  } else {
    const int64_t column = tile * kProjectWarps + warp;
    if (column >= m.length) return;
#pragma unroll 8
    for (int64_t row = lane; row < m.n; row += kWarpSize) {
      const T value = matrix[column * m.stride + row];
      sum += value * value;
    }
    sum = warp_reduce(sum, Sum());
    if (lane == 0) squares[column] = factor * sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kProjectThreads) wide_factor_kernel(const __grid_constant__ ProjectCall call) {
  const int index = call.table.find(blockIdx.x);
  const ProjectMatrix& m = call.table.matrix[index];
  const int64_t begin =
      int64_t{blockIdx.x - call.table.first_tile[index]} * kProjectThreads * kPartElements + threadIdx.x;
  const T sign = call.maximize ? T(-1) : T(1), factor = call.grad_scale ? sign / T(*call.grad_scale) : sign;
  T* const low = static_cast<T*>(m.low);
#pragma unroll
  for (int e = 0; e < kPartElements; ++e) {
    const int64_t element = begin + e * kProjectThreads;
    if (element < int64_t{m.rank} * m.length) low[element] *= factor;
  }
}

}  // namespace pykern::lowrank
