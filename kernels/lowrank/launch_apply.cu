#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/lowrank/apply_layout.h"
#include "kernels/lowrank/apply_sm80.cuh"
#include "kernels/lowrank/apply_wide_sm80.cuh"

namespace pykern::lowrank {
namespace {

bool has_product(const ApplyMatrix& m, DataType type) {
  return (type == DataType::bf16 || type == DataType::f16) && m.rank > 0 && (m.direction || m.low);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
const char* launch_wide(const ApplyCall& call, bool along_length, Stream stream) {
  const Grid grid{dim3(call.table.tiles), dim3(kApplyThreads)};
  return launch(along_length ? apply_wide_kernel<T, true> : apply_wide_kernel<T, false>, grid, stream, call);
}

template <class T>
const char* launch_product(const ApplyCall& call, bool along_length, Stream stream) {
  const Grid grid{dim3(call.table.tiles), dim3(kApplyThreads), kApplySharedBytes};
  return launch(along_length ? apply_kernel<T, true> : apply_kernel<T, false>, grid, stream, call);
}

const char* launch_typed(const ApplyCall& call, DataType type, bool product, bool along_length, Stream stream) {
  return with_any_type(type, [&](auto value) {
    using T = decltype(value);
    if constexpr (sizeof(T) == 2) {
      if (product) return launch_product<T>(call, along_length, stream);
    }
    return launch_wide<T>(call, along_length, stream);
  });
}

}  // namespace

const char* launch_apply(const ApplyParams& params, Stream stream) {
  bool has_sm90 = false;
#if defined(PYKERN_HAS_SM90)
  has_sm90 = compute_capability() == 90;
  if (has_sm90) {
    if (const char* error = launch_apply_sm90(params, stream)) return error;
  }
#endif
  const auto is_left = [&](const ApplyMatrix& m) {
    return !has_sm90 || apply_layout(m, params.type).width == 0;
  };
  ApplyCall call{{}, params.rule};
  const int64_t pack = params.type == DataType::f64 ? 2 : params.type == DataType::f32 ? 4 : 8;
  for (const bool product : {true, false}) {
    for (const bool along_length : {true, false}) {
      const char* error = launch_grouped(
          call.table, params.count, [&](int64_t i) -> const ApplyMatrix& { return params.matrices[i]; },
          [&](int64_t i) -> int64_t {
            const ApplyMatrix& m = params.matrices[i];
            if (m.along_length != along_length || has_product(m, params.type) != product || !is_left(m)) return 0;
            const int64_t rows = along_length ? m.n : m.length, columns = along_length ? m.length : m.n;
            return product ? ceil_div(rows, kApplyTile) * ceil_div(columns, kApplyTile)
                           : ceil_div(rows, kSlabRows) * ceil_div(columns, kSlabPacks * pack);
          },
          [&](const ApplyTable&) { return launch_typed(call, params.type, product, along_length, stream); });
      if (error) return error;
    }
  }
  return nullptr;
}

}  // namespace pykern::lowrank
