// gather_rows and its gradient on CUDA.
#include <torch/csrc/stable/library.h>

#include "attention/rows_checks.h"
#include "common/cuda.h"
#include "kernels/attention/rows.h"

namespace pykern {
namespace {

Tensor gather_rows(Tensor source, Tensor rows) {
  cuda::check_device(source, "source");
  cuda::check_device(rows, "rows");
  check_matrix(source, "source");
  check_indices(rows, "rows");
  const cuda::DeviceGuard guard(source);
  Tensor out = cuda::empty(source, {rows.size(0), source.size(1)}, source.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t element = source.element_size();
  const GatherRows params{cuda::input(source),          cuda::input<int64_t>(rows), cuda::output(out),
                          source.size(0),               rows.size(0),               source.size(1) * element,
                          source.stride(0) * element};
  cuda::check_launch(launch_gather_rows(params, cuda::current_stream(source)), "gather_rows");
  return out;
}

Tensor backward(Tensor grad_out, Tensor order, Tensor offsets) {
  cuda::check_device(grad_out, "grad_out");
  cuda::check_device(order, "order");
  cuda::check_device(offsets, "offsets");
  check_inverse(grad_out, order, offsets);
  const cuda::DeviceGuard guard(grad_out);
  const int64_t source_rows = offsets.size(0) - 1;
  Tensor grad_source = cuda::empty(grad_out, {source_rows, grad_out.size(1)}, grad_out.scalar_type());
  if (grad_source.numel() == 0) return grad_source;
  const GatherRowsBackward params{data_type(grad_out, "grad_out"),
                                  cuda::input(grad_out),
                                  cuda::input<int64_t>(order),
                                  cuda::input<int64_t>(offsets),
                                  cuda::output(grad_source),
                                  source_rows,
                                  grad_out.size(0),
                                  grad_out.size(1),
                                  grad_out.stride(0)};
  cuda::check_launch(launch_gather_rows_backward(params, cuda::current_stream(grad_out)), "gather_rows_backward");
  return grad_source;
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("gather_rows_backward", TORCH_BOX(&backward));
}

}  // namespace pykern
