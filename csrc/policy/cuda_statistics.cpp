// Host side of group_statistics on a GPU.
#include <tuple>

#include "common/cuda.h"
#include "kernels/policy/statistics.h"
#include "policy/statistics_arguments.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor, Tensor> group_statistics(Tensor values, Tensor group_ids, int64_t ddof) {
  check_group_statistics(values, group_ids, ddof, cuda::check_device);
  const int64_t rows = values.size(0);
  const cuda::DeviceGuard guard(values);
  Tensor mean = cuda::empty(values, {rows}, values.scalar_type());
  Tensor deviation = cuda::empty(values, {rows}, values.scalar_type());
  Tensor count = cuda::empty(values, {rows}, ScalarType::Long);
  if (rows == 0) return {mean, deviation, count};
  // A table in global memory, for blocks whose groups have more rows than shared memory holds.
  Tensor tables = cuda::empty(values, {rows > kSharedGroupRows ? rows * kAdvantageRowBytes : 0}, ScalarType::Byte);

  StatisticsParams params{};
  params.groups.rewards = cuda::input(values);
  params.groups.ids = cuda::input<int64_t>(group_ids);
  params.groups.tables = cuda::workspace<unsigned char>(tables);
  params.groups.rows = rows;
  params.groups.scale = Scale::group_std;
  params.groups.ddof = static_cast<int>(ddof);
  params.mean = cuda::output(mean);
  params.deviation = cuda::output(deviation);
  params.count = cuda::output<int64_t>(count);
  cuda::check_launch(launch_group_statistics(data_type(values, "values"), params, cuda::current_stream(values)),
                     "group_statistics");
  return {mean, deviation, count};
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("group_statistics", TORCH_BOX(&group_statistics)); }

}  // namespace pykern
