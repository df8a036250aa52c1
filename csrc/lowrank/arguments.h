// Checks of the ops' arguments that the CPU and the CUDA side share; `on_device` is check_cpu or its CUDA kin.
#pragma once

#include "common/checks.h"

namespace pykern::lowrank {

inline bool is_double(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

// One float32 or float64 element.
inline void check_number(const Tensor& tensor, const char* name, DeviceCheck on_device) {
  on_device(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
  if (!is_double(tensor)) check_type(tensor, ScalarType::Float, name);
}

inline ScalarType moment_type(DataType type) { return type == DataType::f64 ? ScalarType::Double : ScalarType::Float; }

inline void check_same_sizes(const Tensor& tensor, const Tensor& like, const char* name) {
  check_dim(tensor, like.dim(), name);
  for (int64_t dim = 0; dim < like.dim(); ++dim) check_size(tensor, dim, like.size(dim), name);
}

// The elements are visited in the order of memory, so all tensors must lie alike, without gaps.
inline void check_layout(const Tensor& param, const Tensor& other, const char* name) {
  check_dim(other, param.dim(), name);
  int64_t span = 1;
  for (int64_t dim = 0; dim < param.dim(); ++dim) {
    check_size(other, dim, param.size(dim), name);
    STD_TORCH_CHECK(param.size(dim) == 1 || other.stride(dim) == param.stride(dim), name,
                    ": expected the strides of param");
    span += (param.size(dim) - 1) * param.stride(dim);
  }
  STD_TORCH_CHECK(span == param.numel(), "param: expected a tensor without gaps");
}

}  // namespace pykern::lowrank
