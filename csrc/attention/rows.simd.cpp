#include "attention/rows.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"

namespace pykern::PYKERN_SIMD {
namespace {

template <class T>
PYKERN_INLINE vfloat load_up_to(const T* source, int64_t count) {
  return count >= kLanes ? load(source) : load_partial(source, count);
}

template <class T>
void sum_uses(const GatherRowsBackward& params, int64_t row) {
  const T* source = static_cast<const T*>(params.grad_out);
  T* target = static_cast<T*>(params.grad_source) + row * params.columns;
  for (int64_t column = 0; column < params.columns; column += kLanes) {
    const int64_t left = params.columns - column;
    vfloat sum = zero();
    for (int64_t use = params.offsets[row]; use < params.offsets[row + 1]; ++use) {
      sum += load_up_to(source + params.order[use] * params.grad_stride + column, left);
    }
    if (left >= kLanes) {
      store(target + column, sum);
    } else {
      store_partial(target + column, sum, left);
    }
  }
}

template <class T>
void backward(const GatherRowsBackward& params) {
  const int64_t rows_per_task = ceil_div(32768, params.columns);
  parallel_tasks(ceil_div(params.source_rows, rows_per_task), [&](int64_t task, int) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = begin + rows_per_task < params.source_rows ? begin + rows_per_task : params.source_rows;
    for (int64_t row = begin; row < end; ++row) sum_uses<T>(params, row);
  });
}

}  // namespace

void gather_rows_backward(const GatherRowsBackward& params) {
  if (params.type == DataType::f32) return backward<float>(params);
  if (params.type == DataType::bf16) return backward<bf16>(params);
  backward<f16>(params);
}

}  // namespace pykern::PYKERN_SIMD
