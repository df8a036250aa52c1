// gather_rows and its gradient on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "attention/rows.h"
#include "attention/rows_checks.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pykern {
namespace {

Tensor gather_rows(Tensor source, Tensor rows) {
  check_cpu(source, "source");
  check_cpu(rows, "rows");
  check_matrix(source, "source");
  check_indices(rows, "rows");
  Tensor out = torch::stable::new_empty(source, {rows.size(0), source.size(1)});
  const int64_t count = rows.size(0), limit = source.size(0);
  const int64_t row_bytes = source.size(1) * source.element_size();
  const int64_t stride = source.stride(0) * source.element_size();
  const int64_t* at = input<int64_t>(rows);
  for (int64_t n = 0; n < count; ++n) {
    STD_TORCH_CHECK(at[n] >= 0 && at[n] < limit, "rows: expected values from 0 to ", limit - 1, ", got ", at[n]);
  }
  if (out.numel() == 0) return out;
  const char* from = input<char>(source);
  char* to = output<char>(out);
  // One run of rows for each thread, so that a thread meets its part of the memory again at the next call.
  const int64_t rows_per_task = std::max(ceil_div(131072, row_bytes), ceil_div(count, max_threads()));
  parallel_tasks(ceil_div(count, rows_per_task), [&](int64_t task, int) {
    const int64_t end = std::min((task + 1) * rows_per_task, count);
    for (int64_t n = task * rows_per_task; n < end; ++n) {
      std::memcpy(to + n * row_bytes, from + at[n] * stride, row_bytes);
    }
  });
  return out;
}

void backward_float64(const GatherRowsBackward& params) {
  const double* source = static_cast<const double*>(params.grad_out);
  double* target = static_cast<double*>(params.grad_source);
  parallel_tasks(params.source_rows, [&](int64_t row, int) {
    double* sums = target + row * params.columns;
    std::fill_n(sums, params.columns, 0.0);
    for (int64_t use = params.offsets[row]; use < params.offsets[row + 1]; ++use) {
      const double* from = source + params.order[use] * params.grad_stride;
      for (int64_t column = 0; column < params.columns; ++column) sums[column] += from[column];
    }
  });
}

Tensor backward(Tensor grad_out, Tensor order, Tensor offsets) {
  check_cpu(grad_out, "grad_out");
  check_cpu(order, "order");
  check_cpu(offsets, "offsets");
  check_inverse(grad_out, order, offsets);
  const int64_t count = grad_out.size(0), source_rows = offsets.size(0) - 1;
  GatherRowsBackward params{data_type(grad_out, "grad_out"),
                            grad_out.const_data_ptr(),
                            input<int64_t>(order),
                            input<int64_t>(offsets),
                            nullptr,
                            source_rows,
                            count,
                            grad_out.size(1),
                            grad_out.stride(0)};
  for (int64_t use = 0; use < count; ++use) {
    STD_TORCH_CHECK(params.order[use] >= 0 && params.order[use] < count, "order: expected values from 0 to ",
                    count - 1, ", got ", params.order[use]);
  }
  for (int64_t row = 0; row <= source_rows; ++row) {
    STD_TORCH_CHECK(params.offsets[row] >= 0 && params.offsets[row] <= count, "offsets: expected values from 0 to ",
                    count, ", got ", params.offsets[row]);
  }
  Tensor grad_source = torch::stable::new_empty(grad_out, {source_rows, grad_out.size(1)});
  if (grad_source.numel() == 0) return grad_source;
  params.grad_source = grad_source.mutable_data_ptr();
  if (params.type == DataType::f64) {
    backward_float64(params);
  } else {
    gather_rows_backward()(params);
  }
  return grad_source;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("gather_rows_backward", TORCH_BOX(&backward));
}

}  // namespace pykern
