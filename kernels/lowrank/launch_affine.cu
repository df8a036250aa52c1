#include "kernels/common/launch.h"
#include "kernels/lowrank/affine_sm80.cuh"

namespace pykern::lowrank {
namespace {

// Blocks that stay, over all matrices of a launch.
constexpr int64_t kResident = 8;

// The matrices side by side, in as many columns of blocks as the largest of them needs.
unsigned blocks_for(const AffineParams& params, bool packs) {
  int64_t wanted = 1;
  for (int i = 0; i < params.count; ++i) {
    const AffineMatrix& matrix = params.matrices[i];
    const int64_t rows_per_block = packs ? kAffineWarps : kTileRows;
    const int64_t units = packs ? matrix.rows * affine_groups(matrix.columns)
                                : (matrix.rows + kTileRows - 1) / kTileRows * affine_groups(matrix.columns);
    const int64_t blocks = packs ? (units + rows_per_block - 1) / rows_per_block : units;
    if (blocks > wanted) wanted = blocks;
  }
  const int64_t most = (int64_t{multiprocessors()} * kResident + params.count - 1) / params.count;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

template <class T>
bool all_allow_packs(const AffineParams& params) {
  for (int i = 0; i < params.count; ++i) {
    const AffineMatrix& matrix = params.matrices[i];
    const bool neighbours = matrix.column_stride == 1 && matrix.columns % kGroupValues == 0;
    if (!neighbours || !allows_packs(static_cast<const T*>(matrix.values), matrix.rows > 1 ? matrix.row_stride : 0) ||
        !allows_packs(matrix.codes)) {
      return false;
    }
  }
  return true;
}

template <class T>
const char* quantize_typed(const AffineParams& params, Stream stream) {
  const bool packs = all_allow_packs<T>(params);
  const Grid grid{dim3(blocks_for(params, packs), static_cast<unsigned>(params.count)), dim3(kAffineThreads)};
  return packs ? launch(quantize_packs_kernel<T>, grid, stream, params)
               : launch(quantize_tiles_kernel<T>, grid, stream, params);
}

template <class T>
const char* dequantize_typed(const AffineParams& params, Stream stream) {
  const bool packs = all_allow_packs<T>(params);
  const Grid grid{dim3(blocks_for(params, packs), static_cast<unsigned>(params.count)), dim3(kAffineThreads)};
  return packs ? launch(dequantize_packs_kernel<T>, grid, stream, params)
               : launch(dequantize_tiles_kernel<T>, grid, stream, params);
}

}  // namespace

const char* launch_quantize_groups(const AffineParams& params, Stream stream) {
  const Grid grid{dim3(blocks_for(params, false), static_cast<unsigned>(params.count)), dim3(kAffineThreads)};
  switch (params.type) {
    case DataType::f32: return quantize_typed<float>(params, stream);
    case DataType::bf16: return quantize_typed<bf16>(params, stream);
    case DataType::f16: return quantize_typed<f16>(params, stream);
    case DataType::f64: return launch(quantize_tiles_kernel<double>, grid, stream, params);
  }
  return "unknown data type";
}

const char* launch_dequantize_groups(const AffineParams& params, Stream stream) {
  const Grid grid{dim3(blocks_for(params, false), static_cast<unsigned>(params.count)), dim3(kAffineThreads)};
  switch (params.type) {
    case DataType::f32: return dequantize_typed<float>(params, stream);
    case DataType::bf16: return dequantize_typed<bf16>(params, stream);
    case DataType::f16: return dequantize_typed<f16>(params, stream);
    case DataType::f64: return launch(dequantize_tiles_kernel<double>, grid, stream, params);
  }
  return "unknown data type";
}

}  // namespace pykern::lowrank
