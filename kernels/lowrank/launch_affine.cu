#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/lowrank/affine_sm80.cuh"

namespace pykern::lowrank {
namespace {

template <class T>
bool takes_packs(const AffineMatrix& matrix) {
  return sizeof(T) < 8 && matrix.column_stride == 1 && matrix.columns % kGroupValues == 0 &&
         allows_packs(static_cast<const T*>(matrix.values), matrix.rows > 1 ? matrix.row_stride : 0) &&
         reinterpret_cast<uintptr_t>(matrix.codes) % kGroupValues == 0;
}

// Blocks of a matrix; none where it is of the other kind.
template <class T>
int64_t blocks_of(const AffineMatrix& matrix, bool packs) {
  if (takes_packs<T>(matrix) != packs) return 0;
  const int64_t groups = affine_groups(matrix.columns);
  return packs ? (matrix.rows * groups + kAffineWarps - 1) / kAffineWarps
               : (matrix.rows + kTileRows - 1) / kTileRows * groups;
}

using Kernel = void (*)(AffineTable, AffineParams);

// Those that take packs first, then the others.
template <class T>
const char* launch_typed(Kernel packed, Kernel tiled, const AffineParams& params, const AffineMatrix* matrices,
                         int64_t count, Stream stream) {
  AffineTable table;
  for (const bool packs : {true, false}) {
    const char* error = launch_grouped(
        table, count, [&](int64_t i) { return matrices[i]; },
        [&](int64_t i) { return blocks_of<T>(matrices[i], packs); },
        [&](const AffineTable& filled) {
          return launch(packs ? packed : tiled, Grid{dim3(filled.tiles), dim3(kAffineThreads)}, stream, filled, params);
        });
    if (error) return error;
  }
  return nullptr;
}

}  // namespace

const char* launch_quantize_groups(const AffineParams& params, const AffineMatrix* matrices, int64_t count,
                                   Stream stream) {
  return with_any_type(params.type, [&](auto value) {
    using T = decltype(value);
    Kernel packed = nullptr;
    if constexpr (sizeof(T) < 8) packed = quantize_packs_kernel<T>;
    return launch_typed<T>(packed, quantize_tiles_kernel<T>, params, matrices, count, stream);
  });
}

const char* launch_dequantize_groups(const AffineParams& params, const AffineMatrix* matrices, int64_t count,
                                     Stream stream) {
  return with_any_type(params.type, [&](auto value) {
    using T = decltype(value);
    Kernel packed = nullptr;
    if constexpr (sizeof(T) < 8) packed = dequantize_packs_kernel<T>;
    return launch_typed<T>(packed, dequantize_tiles_kernel<T>, params, matrices, count, stream);
  });
}

}  // namespace pykern::lowrank
