#include "kernels/common/launch.h"
#include "kernels/lowrank/tiling.h"
#include "kernels/lowrank/update_sm80.cuh"

namespace pykern::lowrank {
namespace {

template <class T, bool kPacks, bool kResidual>
const char* launch_tiled(const WeightUpdateParams& params, Stream stream) {
  const int64_t per_thread = kPacks ? Pack<T>::kSize : kUpdateScalars;
  const Tiling tiling = tiling_for((params.columns + per_thread - 1) / per_thread);
  return launch(weight_update_kernel<T, kPacks, kResidual>,
                Grid{tiling_blocks(tiling, params.rows), dim3(kUpdateThreads)}, stream, params, tiling);
}

template <class T>
const char* launch_typed(WeightUpdateParams params, Stream stream) {
  const bool residual = params.grad != nullptr;
  if (!residual && (params.param_stride == params.columns || params.rows == 1)) {
    // Without gaps and factors it is one long row, whatever the number of columns.
    params.columns *= params.rows;
    params.param_stride = 0;
    params.rows = 1;
  }
  const int64_t update_stride = params.rows == 1 ? 0 : params.columns;
  const bool packs = allows_packs(static_cast<const T*>(params.param), params.param_stride) &&
                     allows_packs(static_cast<const T*>(params.update), update_stride) &&
                     allows_packs(static_cast<const T*>(params.grad), residual ? params.grad_stride : 0);
  if (residual) {
    return packs ? launch_tiled<T, true, true>(params, stream) : launch_tiled<T, false, true>(params, stream);
  }
  return packs ? launch_tiled<T, true, false>(params, stream) : launch_tiled<T, false, false>(params, stream);
}

}  // namespace

const char* launch_weight_update(const WeightUpdateParams& params, Stream stream) {
  switch (params.type) {
    case DataType::f32: return launch_typed<float>(params, stream);
    case DataType::f64: return launch_typed<double>(params, stream);
    case DataType::bf16: return launch_typed<bf16>(params, stream);
    case DataType::f16: return launch_typed<f16>(params, stream);
  }
  return "unknown data type";
}

}  // namespace pykern::lowrank
