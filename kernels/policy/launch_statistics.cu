#include "kernels/common/with_type.h"
#include "kernels/policy/group_grid.h"
#include "kernels/policy/statistics_sm80.cuh"

namespace pykern {

const char* launch_group_statistics(DataType type, const StatisticsParams& params, Stream stream) {
  const Grid grid = group_grid(params.groups.rows, kStatisticsThreads, kAdvantageRowBytes);
  return with_wide_type(type, [&](auto value) {
    return launch(group_statistics_kernel<decltype(value)>, grid, stream, params);
  });
}

}  // namespace pykern
