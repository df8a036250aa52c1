#include "kernels/policy/group_grid.h"
#include "kernels/policy/statistics_sm80.cuh"

namespace pykern {

const char* launch_group_statistics(DataType type, const StatisticsParams& params, Stream stream) {
  const Grid grid = group_grid(params.groups.rows, kStatisticsThreads, kAdvantageRowBytes);
  switch (type) {
    case DataType::f32: return launch(group_statistics_kernel<float>, grid, stream, params);
    case DataType::f64: return launch(group_statistics_kernel<double>, grid, stream, params);
    default: return "group_statistics: values of this dtype have no kernel";
  }
}

}  // namespace pykern
