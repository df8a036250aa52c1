// group_statistics on a GPU: what the host hands over.
#pragma once

#include "kernels/policy/advantages.h"

namespace pykern {

struct StatisticsParams {
  AdvantageParams groups;  // rewards are the values; ids, tables, rows, ddof, and group_std for a scale: no more
  void *mean, *deviation;  // [rows], of the values' dtype
  int64_t* count;          // [rows]
};

const char* launch_group_statistics(DataType type, const StatisticsParams& params, Stream stream);

}  // namespace pykern
