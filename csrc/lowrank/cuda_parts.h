// The parts of a low-rank step on CUDA, for the ops and for the whole step. Arguments are checked, the device is
// guarded, and the stream is torch's current one.
#pragma once

#include "common/cuda.h"
#include "lowrank/parts_arguments.h"

namespace pykern::lowrank {

inline int32_t checked_size(int64_t size, const char* name) {
  STD_TORCH_CHECK(size < int64_t{1} << 31, name, ": expected fewer than 2^31 rows and columns, got ", size);
  return static_cast<int32_t>(size);
}

// Whether a matrix [n, length] has its unit stride along its columns, and the stride of the other axis.
struct MatrixLayout {
  bool along_length;
  int64_t stride;
};

inline MatrixLayout matrix_layout(const Tensor& matrix, const char* name) {
  const MatrixStrides strides = matrix_strides(matrix, name);
  const bool along_length = strides.column == 1;
  return {along_length, along_length ? strides.row : strides.column};
}

// low = P^T G, and the columns' squares unless the list is empty. What it returns is the memory of parts of these sums,
// to be kept while the op launches more: on the emulator a launch looks at all memory of those before it.
Tensor project(const Tensors& matrix, const Tensors& projector, const std::optional<Tensor>& grad_scale,
               const Tensors& low, const Tensors& squares, bool maximize, Stream stream);

// The arguments of low_rank_apply.
struct Application {
  const Tensors &param, &projector, &direction, &grad, &factors, &low, &compensation, &step;
  const std::vector<int64_t>& seeds;
  const Tensor &step_factor, &lr;
  const std::optional<Tensor>&grad_scale, &found_inf;
  double scale, weight_decay, sign_scale;
  bool decay_after, maximize;
  Rounding rounding;
};

void apply(const Application& given, Stream stream);

}  // namespace pykern::lowrank
