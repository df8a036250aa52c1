// The entries of a sparse matrix that lie in a dense block of it, row by row.
#include "lowrank/sparse_rows.h"

#include "common/parallel.h"
#include "common/vector.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::first_entry;
using lowrank::SparseRows;

constexpr int64_t kRowsOfTask = 32;

template <class T>
PYKERN_INLINE void add(T value, T* target) {
  if constexpr (sizeof(T) == sizeof(double)) {
    *target += value;
  } else {
    narrow(widen(*target) + widen(value), target);
  }
}

template <class T>
void one_row(const SparseRows& rows, int64_t row) {
  // A row_start that is out of range must not lead out of the entries.
  const int64_t* start = rows.row_start + rows.first_row + row;
  const int64_t end = start[1] < rows.entries ? start[1] : rows.entries;
  const int64_t begin = first_entry(rows.column, start[0] < 0 ? 0 : start[0], end, rows.first_column);
  T* block = static_cast<T*>(rows.block) + row * rows.block_stride;
  T* values = static_cast<T*>(rows.values);
  for (int64_t entry = begin; entry < end; ++entry) {
    const int64_t column = rows.column[entry] - rows.first_column;
    if (column < 0 || column >= rows.columns) break;
    if (rows.take) {
      values[entry] = block[column];
    } else {
      add(values[entry], block + column);
    }
  }
}

template <class T>
void typed(const SparseRows& rows) {
  parallel_tasks((rows.rows + kRowsOfTask - 1) / kRowsOfTask, [&](int64_t task, int) {
    const int64_t end = (task + 1) * kRowsOfTask < rows.rows ? (task + 1) * kRowsOfTask : rows.rows;
    for (int64_t row = task * kRowsOfTask; row < end; ++row) one_row<T>(rows, row);
  });
}

}  // namespace

void sparse_rows(const SparseRows& rows) {
  switch (rows.type) {
    case DataType::f32: return typed<float>(rows);
    case DataType::f64: return typed<double>(rows);
    case DataType::bf16: return typed<bf16>(rows);
    case DataType::f16: return typed<f16>(rows);
  }
}

}  // namespace pykern::PYKERN_SIMD
