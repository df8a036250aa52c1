#include "kernels/common/with_type.h"
#include "kernels/policy/advantages_general_sm80.cuh"
#include "kernels/policy/advantages_sm80.cuh"
#include "kernels/policy/group_entropy_sm80.cuh"
#include "kernels/policy/group_grid.h"

namespace pykern {
namespace {

template <class T>
const char* launch_of_type(const AdvantageParams& params, Stream stream) {
  if (is_plain(params)) {
    const Grid grid = group_grid(params.rows, kAdvantageThreads, kPlainRowBytes);
    return launch(plain_advantages_kernel<T>, grid, stream, params);
  }
  const Grid grid = group_grid(params.rows, kGeneralThreads, kAdvantageRowBytes);
  AdvantageParams call = params;
  if (params.filter != Filter::none) {
    call.stage = AdvantageStage::filter;
    const char* error = launch(general_advantages_kernel<T>, grid, stream, call);
    if (error) return error;
    call.stage = AdvantageStage::after_filter;
  }
  return launch(general_advantages_kernel<T>, grid, stream, call);
}

}  // namespace

const char* launch_group_advantages(DataType type, const AdvantageParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_of_type<decltype(value)>(params, stream); });
}

const char* launch_group_entropy(const EntropyParams& params, Stream stream) {
  return launch(group_entropy_kernel, group_grid(params.rows, kEntropyThreads, kEntropyRowBytes), stream, params);
}

}  // namespace pykern
