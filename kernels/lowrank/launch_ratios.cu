#include "kernels/common/launch.h"
#include "kernels/lowrank/ratios_sm80.cuh"

namespace pykern::lowrank {
namespace {

template <class C>
RatioMatrix prepared(RatioMatrix matrix) {
  const auto allows = [&](const void* pointer) {
    return allows_packs(static_cast<const C*>(pointer), matrix.length);
  };
  matrix.packs = allows(matrix.low) && allows(matrix.low_gram) && allows(matrix.direction) && allows(matrix.ratios);
  return matrix;
}

// Launches `kernel` with a block of threads for each strip of a list.
template <class C>
const char* launch_strips(void (*kernel)(RatioTable, RatioParams), const RatioParams& params,
                          const RatioMatrix* matrices, int64_t count, Stream stream) {
  RatioTable table;
  return launch_grouped(
      table, count, [&](int64_t i) { return prepared<C>(matrices[i]); },
      [&](int64_t i) { return strips(params.type, matrices[i].length); },
      [&](const RatioTable& filled) {
        return launch(kernel, Grid{dim3(filled.tiles), dim3(kRatioThreads)}, stream, filled, params);
      });
}

template <class C>
const char* launch_by_matrix(const RatioParams& params, const RatioMatrix* matrices, int64_t count, bool from_strips,
                             bool limits, Stream stream) {
  RatioTable table;
  return launch_grouped(
      table, count, [&](int64_t i) { return matrices[i]; }, [](int64_t) { return 1; },
      [&](const RatioTable& filled) {
        return launch(residual_limit_kernel<C>, Grid{dim3(filled.tiles), dim3(kSumThreads)}, stream, filled, params,
                      from_strips, limits);
      });
}

template <class C>
const char* launch_ratios_typed(const RatioParams& params, const RatioMatrix* matrices, int64_t count, Stream stream) {
  const bool gram = count > 0 && matrices[0].low_gram != nullptr;
  return launch_strips<C>(gram ? column_ratios_kernel<C, true> : column_ratios_kernel<C, false>, params, matrices,
                          count, stream);
}

}  // namespace

const char* launch_ratios(const RatioParams& params, const RatioMatrix* matrices, int64_t count, Stream stream) {
  return params.type == DataType::f64 ? launch_ratios_typed<double>(params, matrices, count, stream)
                                      : launch_ratios_typed<float>(params, matrices, count, stream);
}

const char* launch_ratio_sums(const RatioParams& params, const RatioMatrix* matrices, int64_t count, Stream stream) {
  return params.type == DataType::f64 ? launch_by_matrix<double>(params, matrices, count, true, false, stream)
                                      : launch_by_matrix<float>(params, matrices, count, true, false, stream);
}

const char* launch_limiter(const RatioParams& params, const RatioMatrix* matrices, int64_t count, bool from_strips,
                           Stream stream) {
  return params.type == DataType::f64 ? launch_by_matrix<double>(params, matrices, count, from_strips, true, stream)
                                      : launch_by_matrix<float>(params, matrices, count, from_strips, true, stream);
}

const char* launch_limit(const RatioParams& params, const RatioMatrix* matrices, int64_t count, Stream stream) {
  return params.type == DataType::f64
             ? launch_strips<double>(combine_kernel<double>, params, matrices, count, stream)
             : launch_strips<float>(combine_kernel<float>, params, matrices, count, stream);
}

}  // namespace pykern::lowrank
