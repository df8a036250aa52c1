// Gradients into their subspaces on CUDA: kernels of ours for bfloat16 and float16, and where rows are picked; the
// vendor's products for float32 and float64.
#include "common/products.h"
#include "kernels/lowrank/project.h"
#include "lowrank/cuda_parts.h"

namespace pykern {
namespace lowrank {

Tensor project(const Tensors& matrix, const Tensors& projector, const std::optional<Tensor>& grad_scale,
               const Tensors& low, const Tensors& squares, bool maximize, Stream stream) {
  if (matrix.empty()) return Tensor();
  std::vector<ProjectMatrix> matrices(matrix.size());
  for (size_t i = 0; i < matrix.size(); ++i) {
    const MatrixLayout layout = matrix_layout(matrix[i], "matrix");
    ProjectMatrix& m = matrices[i];
    m.matrix = cuda::input(matrix[i]);
    m.projector = cuda::input(projector[i]);
    m.low = cuda::output(low[i]);
    m.squares = squares.empty() ? nullptr : cuda::output(squares[i]);
    m.parts = nullptr;
    m.stride = layout.stride;
    m.n = checked_size(matrix[i].size(0), "matrix");
    m.length = checked_size(matrix[i].size(1), "matrix");
    m.rank = checked_size(rank_of(projector[i]), "projector");
    m.splits = 1;
    m.along_length = layout.along_length;
    m.warpgroups = m.narrow = false;
  }
  const DataType type = data_type(matrix[0], "matrix");
  ProjectParams params{};
  params.type = type;
  params.count = static_cast<int64_t>(matrices.size());
  params.matrices = matrices.data();
  params.grad_scale = cuda::input<float>(grad_scale);
  params.maximize = maximize;
  if (picks_rows(projector)) {
    cuda::check_launch(launch_project_rows(params, stream), "low_rank_project");
    return Tensor();
  }
  if (type == DataType::f32 || type == DataType::f64) {
    for (size_t i = 0; i < matrix.size(); ++i) {
      if (low[i].numel() > 0) cuda::multiply(cuda::transposed(projector[i]), matrix[i], low[i]);
    }
    cuda::check_launch(launch_project_wide(params, stream), "low_rank_project");
    return Tensor();
  }
  const int64_t floats = plan_project(params);
  const Tensor workspace = cuda::empty(matrix[0], {floats}, ScalarType::Float);
  params.workspace = cuda::workspace<float>(workspace);
  cuda::check_launch(launch_project(params, stream), "low_rank_project");
  return workspace;
}

}  // namespace lowrank

namespace {

void run_project(std::vector<Tensor> matrix, std::vector<Tensor> projector, std::optional<Tensor> grad_scale,
                 std::vector<Tensor> low, std::vector<Tensor> squares, bool maximize) {
  lowrank::check_project(matrix, projector, grad_scale, low, squares, cuda::check_device);
  if (matrix.empty()) return;
  const cuda::DeviceGuard guard(matrix[0]);
  lowrank::project(matrix, projector, grad_scale, low, squares, maximize, cuda::current_stream(matrix[0]));
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("low_rank_project", TORCH_BOX(&run_project)); }

}  // namespace pykern
