// Checks of the arguments of the ops on quantised matrices; the CPU and the CUDA side share them.
#pragma once

#include <optional>
#include <vector>

#include "kernels/lowrank/affine.h"
#include "lowrank/arguments.h"

namespace pykern::lowrank {

inline void check_count(size_t count, size_t expected, const char* name) {
  STD_TORCH_CHECK(count == expected, name, ": expected ", expected, " entries, got ", count);
}

inline void check_optional_number(const std::optional<Tensor>& number, const char* name, DeviceCheck on_device) {
  if (!number) return;
  on_device(*number, name);
  check_type(*number, ScalarType::Float, name);
  STD_TORCH_CHECK(number->numel() == 1, name, ": expected one element, got ", number->numel());
}

inline void check_plane(const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns, const char* name,
                        DeviceCheck on_device) {
  on_device(tensor, name);
  check_type(tensor, type, name);
  check_dim(tensor, 2, name);
  check_size(tensor, 0, rows, name);
  check_size(tensor, 1, columns, name);
  check_contiguous(tensor, name);
}

// Codes, scale and zero of a matrix.
inline void check_groups(const Tensor& codes, const Tensor& scale, const Tensor& zero, int64_t rows, int64_t columns,
                         int bits, DeviceCheck on_device) {
  check_plane(codes, ScalarType::Byte, rows, code_bytes(columns, bits), "codes", on_device);
  check_plane(scale, ScalarType::Float, rows, affine_groups(columns), "scale", on_device);
  check_plane(zero, ScalarType::Float, rows, affine_groups(columns), "zero", on_device);
}

// Returns the type that all values have.
inline DataType check_quantized(const std::vector<Tensor>& values, const std::vector<Tensor>& codes,
                                const std::vector<Tensor>& scale, const std::vector<Tensor>& zero, int64_t bits,
                                DeviceCheck on_device) {
  STD_TORCH_CHECK(bits == 8 || bits == 4, "bits: expected 8 or 4, got ", bits);
  check_count(codes.size(), values.size(), "codes");
  check_count(scale.size(), values.size(), "scale");
  check_count(zero.size(), values.size(), "zero");
  DataType type = DataType::f32;
  for (size_t i = 0; i < values.size(); ++i) {
    on_device(values[i], "values");
    check_dim(values[i], 2, "values");
    if (i == 0) type = data_type(values[i], "values");
    check_type(values[i], values[0].scalar_type(), "values");
    check_groups(codes[i], scale[i], zero[i], values[i].size(0), values[i].size(1), static_cast<int>(bits), on_device);
  }
  return type;
}

inline void check_factor(const Tensor& factor, const char* name, DeviceCheck on_device) {
  on_device(factor, name);
  check_dim(factor, 2, name);
  STD_TORCH_CHECK(data_type(factor, name) != DataType::f64, name, ": expected float32, bfloat16 or float16");
}

inline void check_int8_weights(const std::vector<Tensor>& codes, const std::vector<Tensor>& scale,
                               const std::vector<Tensor>& zero, const std::vector<Tensor>& left,
                               const std::vector<Tensor>& right, const std::vector<Tensor>& step,
                               const std::vector<int64_t>& seeds, const Tensor& step_factor, const Tensor& lr,
                               const std::optional<Tensor>& found_inf, DeviceCheck on_device) {
  const size_t count = codes.size();
  check_count(scale.size(), count, "scale");
  check_count(zero.size(), count, "zero");
  check_count(left.size(), count, "left");
  check_count(right.size(), count, "right");
  check_count(step.size(), count, "step");
  check_count(seeds.size(), count, "seeds");
  for (size_t i = 0; i < count; ++i) {
    check_dim(codes[i], 2, "codes");
    const int64_t rows = codes[i].size(0), columns = codes[i].size(1);
    check_groups(codes[i], scale[i], zero[i], rows, columns, 8, on_device);
    check_factor(left[i], "left", on_device);
    check_factor(right[i], "right", on_device);
    check_size(left[i], 0, rows, "left");
    check_size(right[i], 0, left[i].size(1), "right");
    check_size(right[i], 1, columns, "right");
    check_number(step[i], "step", on_device);
  }
  on_device(step_factor, "step_factor");
  check_type(step_factor, ScalarType::Double, "step_factor");
  STD_TORCH_CHECK(step_factor.numel() == static_cast<int64_t>(count), "step_factor: expected ", count,
                  " elements, got ", step_factor.numel());
  check_contiguous(step_factor, "step_factor");
  check_number(lr, "lr", on_device);
  check_optional_number(found_inf, "found_inf", on_device);
}

}  // namespace pykern::lowrank
