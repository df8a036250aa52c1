#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/lowrank/sparse_rows_sm80.cuh"

namespace pykern::lowrank {
namespace {

template <class T>
const char* launch_typed(const SparseRows& params, Stream stream) {
  const int64_t rows_per_block = kSparseThreads / kWarpSize;
  const dim3 blocks(static_cast<unsigned>((params.rows + rows_per_block - 1) / rows_per_block));
  return launch(sparse_rows_kernel<T>, Grid{blocks, dim3(kSparseThreads)}, stream, params);
}

}  // namespace

const char* launch_sparse_rows(const SparseRows& params, Stream stream) {
  return with_any_type(params.type, [&](auto value) { return launch_typed<decltype(value)>(params, stream); });
}

}  // namespace pykern::lowrank
