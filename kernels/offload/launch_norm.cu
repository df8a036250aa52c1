#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/offload/norm_sm80.cuh"

namespace pykern {
namespace {

// Sums of columns in shared memory take at most as much as two blocks of a multiprocessor have on any architecture.
constexpr int64_t kMostSharedBytes = 48 * 1024;
// The same on every device, so that results are too.
constexpr int64_t kMostBlocks = 264;

int64_t ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t rows_of_block(int64_t columns) { return columns <= kNormWarpColumns ? kNormThreads / kWarpSize : 1; }

template <class T>
bool allows(const void* pointer, int64_t columns) {
  return allows_packs(static_cast<const T*>(pointer), columns);
}

template <class T>
const char* launch_typed(const NormParams& p, Stream stream) {
  const int64_t per_block = rows_of_block(p.columns);
  const bool packed = allows<T>(p.x, p.columns) && allows<T>(p.y, p.columns) && allows<T>(p.weight, p.columns) &&
                      allows<T>(p.bias, p.columns);
  const Grid grid{dim3(static_cast<unsigned>(ceil_divide(p.rows, per_block))), dim3(kNormThreads)};
  if (per_block > 1) {
    return launch(packed ? norm_kernel<T, kWarpSize, true> : norm_kernel<T, kWarpSize, false>, grid, stream, p);
  }
  return launch(packed ? norm_kernel<T, kNormThreads, true> : norm_kernel<T, kNormThreads, false>, grid, stream, p);
}

template <class T>
const char* launch_typed(const NormBackwardParams& p, Stream stream) {
  const int64_t per_block = rows_of_block(p.columns), blocks = norm_backward_blocks(p.rows, p.columns);
  const int64_t places = p.columns * ((p.grad_weight ? 1 : 0) + (p.grad_bias ? 1 : 0));
  const bool packed = allows<T>(p.x, p.columns) && allows<T>(p.grad, p.columns) && allows<T>(p.grad_x, p.columns) &&
                      allows<T>(p.weight, p.columns);
  const int64_t bytes = per_block * places * static_cast<int64_t>(sizeof(float));
  // Rows of warps share a block's part of `partial`, so their sums must be shared.
  const bool sums_shared = per_block > 1 || bytes <= kMostSharedBytes;
  const Grid grid{dim3(static_cast<unsigned>(blocks)), dim3(kNormThreads),
                  sums_shared ? static_cast<size_t>(bytes) : 0};
  const auto run = [&](auto kernel) { return launch(kernel, grid, stream, p, sums_shared); };
  const char* error;
  if (per_block > 1) {
    error = run(packed ? norm_backward_kernel<T, kWarpSize, true> : norm_backward_kernel<T, kWarpSize, false>);
  } else {
    error = run(packed ? norm_backward_kernel<T, kNormThreads, true> : norm_backward_kernel<T, kNormThreads, false>);
  }
  if (error != nullptr || places == 0) return error;
  const Grid sum_grid{dim3(static_cast<unsigned>(ceil_divide(places, kNormSumColumns))), dim3(kNormThreads)};
  return launch(norm_columns_kernel<T>, sum_grid, stream, p, blocks);
}

}  // namespace

int64_t norm_backward_blocks(int64_t rows, int64_t columns) {
  const int64_t needed = ceil_divide(rows, rows_of_block(columns));
  return needed < kMostBlocks ? needed : kMostBlocks;
}

const char* launch_norm(DataType type, const NormParams& params, Stream stream) {
  return with_storage_type(type, [&](auto value) { return launch_typed<decltype(value)>(params, stream); });
}

const char* launch_norm_backward(DataType type, const NormBackwardParams& params, Stream stream) {
  return with_storage_type(type, [&](auto value) { return launch_typed<decltype(value)>(params, stream); });
}

}  // namespace pykern
