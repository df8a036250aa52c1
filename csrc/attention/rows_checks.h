// What the CPU and the CUDA side of gather_rows ask of their arguments.
#pragma once

#include "common/checks.h"

namespace pykern {

inline void check_matrix(const Tensor& tensor, const char* name) {
  data_type(tensor, name);
  check_dim(tensor, 2, name);
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1, name,
                  ": expected the columns of a row side by side");
}

inline void check_indices(const Tensor& tensor, const char* name) {
  check_type(tensor, ScalarType::Long, name);
  check_dim(tensor, 1, name);
  check_contiguous(tensor, name);
}

inline void check_inverse(const Tensor& grad_out, const Tensor& order, const Tensor& offsets) {
  check_matrix(grad_out, "grad_out");
  check_indices(order, "order");
  check_indices(offsets, "offsets");
  check_size(order, 0, grad_out.size(0), "order");
  STD_TORCH_CHECK(offsets.size(0) > 0, "offsets: expected one more than source rows, got none");
}

}  // namespace pykern
