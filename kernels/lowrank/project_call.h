// What a kernel of the projection gets.
#pragma once

#include "kernels/lowrank/grouped.h"
#include "kernels/lowrank/project.h"

namespace pykern::lowrank {

using ProjectTable = GroupedTable<ProjectMatrix>;

struct ProjectCall {
  ProjectTable table;
  const float* grad_scale;
  bool maximize;
};
static_assert(sizeof(ProjectCall) <= 32764, "more than the parameters of a kernel hold");

}  // namespace pykern::lowrank
