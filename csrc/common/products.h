// Matrix products on CUDA by the vendor's library, which torch hands out through its dispatcher.
//
// The stable ABI passes no Scalar, so there is mm but neither addmm nor baddbmm: whoever sums products adds them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

#include "common/checks.h"

namespace pykern::cuda {

inline Tensor detach(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// Some rows of a matrix, or some elements of a vector.
inline Tensor part_of(const Tensor& tensor, int64_t first, int64_t count) {
  Tensor whole = tensor;
  return torch::stable::narrow(whole, 0, first, count);
}

// out = a b. `out` has the type of a and b, or is float32 where they have sixteen bits: then the sums of the product
// are not rounded. Nothing here may require a gradient.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    to<Tensor>(stack[0]);
    return;
  }
#ifdef PYKERN_EMULATED
  // For CPU tensors torch has no product of another type than its factors'.
  multiply(torch::stable::to(a, out.scalar_type()), torch::stable::to(b, out.scalar_type()), out);
#else
  std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
#endif
}

}  // namespace pykern::cuda
