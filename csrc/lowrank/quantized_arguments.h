// Checks of the arguments of the ops on quantised matrices, for the CPU and the CUDA side; `on_device` is check_cpu or
// its CUDA kin. pykern/lowrank/quantized.py says what the arguments are.
#pragma once

#include "kernels/lowrank/affine.h"
#include "lowrank/parts_arguments.h"

namespace pykern::lowrank {

// Codes, scale and zero of a matrix.
inline void check_groups(const Tensors& codes, const Tensors& scale, const Tensors& zero, size_t index, int64_t rows,
                         int64_t columns, int bits, DeviceCheck on_device) {
  const int64_t groups = affine_groups(columns);
  check_dense(codes[index], ScalarType::Byte, rows, code_bytes(columns, bits), element_name("codes", index).c_str(),
              on_device);
  check_dense(scale[index], ScalarType::Float, rows, groups, element_name("scale", index).c_str(), on_device);
  check_dense(zero[index], ScalarType::Float, rows, groups, element_name("zero", index).c_str(), on_device);
}

// Returns the type that all values have.
inline DataType check_quantized(const Tensors& values, const Tensors& codes, const Tensors& scale, const Tensors& zero,
                                int64_t bits, DeviceCheck on_device) {
  STD_TORCH_CHECK(bits == 8 || bits == 4, "bits: expected 8 or 4, got ", bits);
  check_list(codes, values.size(), "codes");
  check_list(scale, values.size(), "scale");
  check_list(zero, values.size(), "zero");
  DataType type = DataType::f32;
  for (size_t i = 0; i < values.size(); ++i) {
    const std::string name = element_name("values", i);
    on_device(values[i], name.c_str());
    check_dim(values[i], 2, name.c_str());
    if (i == 0) type = data_type(values[i], name.c_str());
    check_type(values[i], values[0].scalar_type(), name.c_str());
    check_groups(codes, scale, zero, i, values[i].size(0), values[i].size(1), static_cast<int>(bits), on_device);
  }
  return type;
}

inline void check_int8_weights(const Tensors& codes, const Tensors& scale, const Tensors& zero, const Tensors& left,
                               const Tensors& right, const Tensors& step, const std::vector<int64_t>& seeds,
                               const Tensor& step_factor, const Tensor& lr, const std::optional<Tensor>& found_inf,
                               DeviceCheck on_device) {
  const size_t count = codes.size();
  check_list(scale, count, "scale");
  check_list(zero, count, "zero");
  check_list(left, count, "left");
  check_list(right, count, "right");
  check_list(step, count, "step");
  STD_TORCH_CHECK(seeds.size() == count, "seeds: expected ", count, " numbers, got ", seeds.size());
  check_step_factor(step_factor, count, on_device);
  check_number(lr, "lr", on_device);
  check_optional_one(found_inf, "found_inf", on_device);
  const auto check_factor = [&](const Tensor& factor, int64_t rows, int64_t columns, const std::string& name) {
    on_device(factor, name.c_str());
    check_shape(factor, rows, columns, name.c_str());
    STD_TORCH_CHECK(data_type(factor, name.c_str()) != DataType::f64, name, ": expected float32, bfloat16 or float16");
  };
  for (size_t i = 0; i < count; ++i) {
    check_dim(codes[i], 2, element_name("codes", i).c_str());
    check_dim(left[i], 2, element_name("left", i).c_str());
    const int64_t rows = codes[i].size(0), columns = codes[i].size(1);
    check_groups(codes, scale, zero, i, rows, columns, 8, on_device);
    check_factor(left[i], rows, left[i].size(1), element_name("left", i));
    check_factor(right[i], left[i].size(1), columns, element_name("right", i));
    check_one(step[i], ScalarType::Float, element_name("step", i).c_str(), on_device);
  }
}

}  // namespace pykern::lowrank
