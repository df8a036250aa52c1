#include "kernels/common/launch.h"
#include "kernels/lowrank/residual_sm80.cuh"
#include "kernels/lowrank/tiling.h"

namespace pykern::lowrank {
namespace {

static_assert(kResidualThreads == kUpdateThreads, "combine_kernel is tiled as the weight update is");

dim3 blocks_for(int64_t count, int64_t per_block) {
  return dim3(static_cast<unsigned>((count + per_block - 1) / per_block));
}

template <class T, bool kPacks>
const char* launch_squares(const ResidualParams& params, Stream stream) {
  if (params.right) {
    return launch(row_squares_kernel<T, kPacks>, Grid{blocks_for(params.rows, kResidualWarps), dim3(kResidualThreads)},
                  stream, params);
  }
  const int64_t width = kWarpSize * (kPacks ? Pack<T>::kSize : 1), column_blocks = (params.columns + width - 1) / width;
  return launch(column_squares_kernel<T, kPacks>,
                Grid{blocks_for(column_blocks * square_parts(false, params.rows), 1), dim3(kResidualThreads)}, stream,
                params, static_cast<unsigned>(column_blocks));
}

template <class T>
const char* launch_typed(const ResidualParams& params, Stream stream) {
  const int64_t lines = params.right ? params.rows : params.columns;
  const Grid by_warps{blocks_for(params.rows, kResidualWarps), dim3(kResidualThreads)};
  const Grid by_lanes{blocks_for(params.columns, kWarpSize), dim3(kResidualThreads)};
  const char* error = params.right ? launch(measure_rows_kernel<T>, by_warps, stream, params)
                                   : launch(measure_columns_kernel<T>, by_lanes, stream, params);
  if (error != nullptr) return error;

  const bool packs = allows_packs(static_cast<const T*>(params.grad), params.grad_stride) &&
                     (params.right || params.columns % Pack<T>::kSize == 0);
  error = packs ? launch_squares<T, true>(params, stream) : launch_squares<T, false>(params, stream);
  if (error != nullptr) return error;

  const int64_t sums = line_blocks(lines);
  error = launch(line_residuals_kernel<T>, Grid{blocks_for(sums, 1), dim3(kResidualThreads)}, stream, params,
                 square_parts(params.right, params.rows));
  if (error != nullptr) return error;

  const Tiling tiling = tiling_for(params.right ? params.rank : params.columns);
  return launch(combine_kernel<T>,
                Grid{tiling_blocks(tiling, params.right ? params.rows : params.rank), dim3(kResidualThreads)}, stream,
                params, sums, tiling);
}

}  // namespace

const char* launch_residual(const ResidualParams& params, Stream stream) {
  switch (params.type) {
    case DataType::f32: return launch_typed<float>(params, stream);
    case DataType::f64: return launch_typed<double>(params, stream);
    case DataType::bf16: return launch_typed<bf16>(params, stream);
    case DataType::f16: return launch_typed<f16>(params, stream);
  }
  return "unknown data type";
}

}  // namespace pykern::lowrank
