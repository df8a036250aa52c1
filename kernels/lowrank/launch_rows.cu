#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/lowrank/rows_sm80.cuh"

namespace pykern::lowrank {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T, bool along_length>
const char* launch_pick(ProjectCall& call, const ProjectParams& params, Stream stream) {
  return launch_grouped(
      call.table, params.count, [&](int64_t i) -> const ProjectMatrix& { return params.matrices[i]; },
      [&](int64_t i) -> int64_t {
        const ProjectMatrix& m = params.matrices[i];
        return m.along_length == along_length ? m.rank * ceil_div(m.length, kPickWidth<T, along_length>) : 0;
      },
      [&](const ProjectTable& table) {
        return launch(pick_rows_kernel<T, along_length>, Grid{dim3(table.tiles), dim3(kPickThreads)}, stream, call);
      });
}

template <class T>
const char* launch_pick(const ProjectParams& params, Stream stream) {
  ProjectCall call{{}, params.grad_scale, params.maximize};
  const char* error = launch_pick<T, true>(call, params, stream);
  return error ? error : launch_pick<T, false>(call, params, stream);
}

template <class T>
const char* launch_picked(const PickedApplyCall& call, bool along_length, Stream stream) {
  const Grid grid{dim3(call.table.tiles), dim3(kApplyThreads)};
  return launch(along_length ? apply_rows_kernel<T, true> : apply_rows_kernel<T, false>, grid, stream, call);
}

}  // namespace

const char* launch_project_rows(const ProjectParams& params, Stream stream) {
  return with_any_type(params.type, [&](auto value) { return launch_pick<decltype(value)>(params, stream); });
}

const char* launch_apply_rows(const ApplyParams& params, Stream stream) {
  const int64_t pack = params.type == DataType::f64 ? 2 : params.type == DataType::f32 ? 4 : 8;
  bool others_change = params.rule.weight_decay != 0 || params.rule.rounding == WeightRounding::kahan;
  // The gradient of an empty weight has no memory: the first one alone does not tell.
  for (int64_t i = 0; i < params.count; ++i) others_change = others_change || params.matrices[i].grad != nullptr;
  for (const bool along_length : {true, false}) {
    PickedApplyCall call{{}, params.rule, along_length && !others_change};
    const char* error = launch_grouped(
        call.table, params.count, [&](int64_t i) -> const ApplyMatrix& { return params.matrices[i]; },
        [&](int64_t i) -> int64_t {
          const ApplyMatrix& m = params.matrices[i];
          if (m.along_length != along_length) return 0;
          const int64_t rows = call.picked_only ? m.rank : along_length ? m.n : m.length;
          return ceil_div(rows, kSlabRows) * ceil_div(along_length ? m.length : m.n, kSlabPacks * pack);
        },
        [&](const ApplyTable&) {
          return with_any_type(params.type, [&](auto value) {
            return launch_picked<decltype(value)>(call, along_length, stream);
          });
        });
    if (error) return error;
  }
  return nullptr;
}

}  // namespace pykern::lowrank
