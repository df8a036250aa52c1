// Checks of the arguments of the low-rank parts, for the CPU and the CUDA side; `on_device` is check_cpu or its CUDA
// kin. pykern/lowrank/ops.py says what the arguments are.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels/lowrank/dynamic_map.h"
#include "kernels/lowrank/parts_kinds.h"
#include "lowrank/arguments.h"

namespace pykern::lowrank {

using Tensors = std::vector<Tensor>;

inline std::string element_name(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

// Strides of a matrix whose unit stride is along either axis: one of the two is 1. Strides along axes of one element
// or none mean nothing and may be replaced.
struct MatrixStrides {
  int64_t row, column;
};

inline MatrixStrides matrix_strides(const Tensor& matrix, const char* name) {
  MatrixStrides strides{matrix.stride(0), matrix.stride(1)};
  if (strides.row == 1 || strides.column == 1) return strides;
  if (matrix.size(1) <= 1) {
    strides.column = 1;
  } else {
    STD_TORCH_CHECK(matrix.size(0) <= 1, name, ": expected unit stride along one axis, got strides (", strides.row,
                    ", ", strides.column, ")");
    strides.row = 1;
  }
  return strides;
}

inline void check_list(const Tensors& list, size_t count, const char* name) {
  STD_TORCH_CHECK(list.size() == count, name, ": expected ", count, " tensors, got ", list.size());
}

inline void check_list_or_none(const Tensors& list, size_t count, const char* name) {
  STD_TORCH_CHECK(list.empty() || list.size() == count, name, ": expected ", count, " tensors or none, got ",
                  list.size());
}

// [n, length], of one of the four floating-point dtypes.
inline void check_matrix(const Tensor& matrix, ScalarType type, const char* name, DeviceCheck on_device) {
  on_device(matrix, name);
  check_dim(matrix, 2, name);
  check_type(matrix, type, name);
  matrix_strides(matrix, name);
}

inline void check_shape(const Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
  check_dim(tensor, 2, name);
  check_size(tensor, 0, rows, name);
  check_size(tensor, 1, columns, name);
}

inline void check_dense(const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns, const char* name,
                        DeviceCheck on_device) {
  on_device(tensor, name);
  check_type(tensor, type, name);
  check_shape(tensor, rows, columns, name);
  check_contiguous(tensor, name);
}

inline void check_columns(const Tensor& tensor, ScalarType type, int64_t length, const char* name,
                          DeviceCheck on_device) {
  on_device(tensor, name);
  check_type(tensor, type, name);
  check_dim(tensor, 1, name);
  check_size(tensor, 0, length, name);
  check_contiguous(tensor, name);
}

inline void check_one(const Tensor& tensor, ScalarType type, const char* name, DeviceCheck on_device) {
  on_device(tensor, name);
  check_type(tensor, type, name);
  STD_TORCH_CHECK(tensor.numel() == 1, name, ": expected one element, got ", tensor.numel());
}

inline void check_optional_one(const std::optional<Tensor>& tensor, const char* name, DeviceCheck on_device) {
  if (tensor) check_one(*tensor, ScalarType::Float, name, on_device);
}

inline void check_projector(const Tensor& projector, const Tensor& matrix, const char* name, DeviceCheck on_device) {
  check_dim(projector, 2, name);
  check_dense(projector, matrix.scalar_type(), matrix.size(0), projector.size(1), name, on_device);
  STD_TORCH_CHECK(projector.size(1) > 0 || matrix.numel() == 0, name, ": expected at least one column");
}

// A projector of the parts is P [n, rank] itself, or int64 [rank]: the rows that it picks, whose P has a one in each of
// its columns, or none where the row is -1.
inline bool picks_rows(const Tensors& projector) { return !projector.empty() && projector[0].dim() == 1; }
inline int64_t rank_of(const Tensor& projector) { return projector.size(projector.dim() - 1); }

inline void check_basis(const Tensors& projector, size_t index, const Tensor& matrix, DeviceCheck on_device) {
  const std::string name = element_name("projector", index);
  const Tensor& one = projector[index];
  if (!picks_rows(projector)) return check_projector(one, matrix, name.c_str(), on_device);
  on_device(one, name.c_str());
  check_dim(one, 1, name.c_str());
  check_type(one, ScalarType::Long, name.c_str());
  check_contiguous(one, name.c_str());
  STD_TORCH_CHECK(one.size(0) > 0 || matrix.numel() == 0, name, ": expected at least one row");
}

inline void check_step_factor(const Tensor& step_factor, size_t count, DeviceCheck on_device) {
  check_columns(step_factor, ScalarType::Double, static_cast<int64_t>(count), "step_factor", on_device);
}

inline void check_project(const Tensors& matrix, const Tensors& projector, const std::optional<Tensor>& grad_scale,
                          const Tensors& low, const Tensors& squares, DeviceCheck on_device) {
  const size_t count = matrix.size();
  check_list(projector, count, "projector");
  check_list(low, count, "low");
  check_list_or_none(squares, count, "squares");
  STD_TORCH_CHECK(squares.empty() || !picks_rows(projector), "squares: expected none of projectors that pick rows");
  check_optional_one(grad_scale, "grad_scale", on_device);
  for (size_t i = 0; i < count; ++i) {
    const std::string name = element_name("matrix", i);
    const ScalarType wide = moment_type(data_type(matrix[i], name.c_str()));
    check_matrix(matrix[i], matrix[0].scalar_type(), name.c_str(), on_device);
    check_basis(projector, i, matrix[i], on_device);
    const int64_t length = matrix[i].size(1);
    check_dense(low[i], wide, rank_of(projector[i]), length, element_name("low", i).c_str(), on_device);
    if (!squares.empty()) check_columns(squares[i], wide, length, element_name("squares", i).c_str(), on_device);
  }
}

// Low-rank matrices [rank, length], float32 or float64.
inline ScalarType check_low(const Tensors& low, DeviceCheck on_device) {
  if (low.empty()) return ScalarType::Float;
  const ScalarType type = low[0].scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "low[0]: expected float32 or float64");
  for (size_t i = 0; i < low.size(); ++i) {
    const std::string name = element_name("low", i);
    check_dim(low[i], 2, name.c_str());
    check_dense(low[i], type, low[i].size(0), low[i].size(1), name.c_str(), on_device);
  }
  return type;
}

// `matrices` are like `low`, one for one.
inline void check_like_low(const Tensors& matrices, const Tensors& low, ScalarType type, const char* list,
                           DeviceCheck on_device) {
  for (size_t i = 0; i < matrices.size(); ++i) {
    check_dense(matrices[i], type, low[i].size(0), low[i].size(1), element_name(list, i).c_str(), on_device);
  }
}

inline void check_scales(const Tensors& scales, const Tensors& low, const char* list, DeviceCheck on_device) {
  for (size_t i = 0; i < scales.size(); ++i) {
    check_dense(scales[i], ScalarType::Float, low[i].size(0), quant_blocks(low[i].size(1)),
                element_name(list, i).c_str(), on_device);
  }
}

inline InnerRule checked_rule(int64_t rule) {
  STD_TORCH_CHECK(rule >= 0 && rule <= static_cast<int64_t>(InnerRule::momentum), "rule: expected 0 (adamw), 1 "
                  "(adabelief), 2 (lion) or 3 (momentum), got ", rule);
  return static_cast<InnerRule>(rule);
}

inline MomentStorage check_rule(const Tensors& low, const Tensors& exp_avg, const Tensors& exp_avg_sq,
                                const Tensors& exp_avg_scale, const Tensors& exp_avg_sq_scale, const Tensors& step,
                                const Tensors& direction, const Tensor& step_factor,
                                const std::optional<Tensor>& found_inf, int64_t rule, DeviceCheck on_device) {
  const size_t count = low.size();
  const InnerRule kind = checked_rule(rule);
  const size_t seconds = kind == InnerRule::adamw || kind == InnerRule::adabelief ? count : 0;
  check_list(exp_avg, count, "exp_avg");
  check_list(exp_avg_sq, seconds, "exp_avg_sq");
  check_list_or_none(exp_avg_scale, count, "exp_avg_scale");
  check_list(exp_avg_sq_scale, exp_avg_scale.empty() ? 0 : seconds, "exp_avg_sq_scale");
  check_list(step, count, "step");
  check_list(direction, count, "direction");
  check_step_factor(step_factor, count, on_device);
  check_optional_one(found_inf, "found_inf", on_device);
  const ScalarType type = check_low(low, on_device);
  if (count == 0) return MomentStorage::wide;
  MomentStorage storage = MomentStorage::wide;
  ScalarType stored = type;
  if (!exp_avg_scale.empty()) {
    STD_TORCH_CHECK(type == ScalarType::Float, "low[0]: expected float32 with 8-bit moments");
    storage = MomentStorage::eight_bit;
    stored = ScalarType::Byte;
  } else if (type == ScalarType::Float && exp_avg[0].scalar_type() == ScalarType::BFloat16) {
    storage = MomentStorage::bfloat16;
    stored = ScalarType::BFloat16;
  }
  check_like_low(exp_avg, low, stored, "exp_avg", on_device);
  check_like_low(exp_avg_sq, low, stored, "exp_avg_sq", on_device);
  check_scales(exp_avg_scale, low, "exp_avg_scale", on_device);
  check_scales(exp_avg_sq_scale, low, "exp_avg_sq_scale", on_device);
  check_like_low(direction, low, type, "direction", on_device);
  for (size_t i = 0; i < count; ++i) check_one(step[i], ScalarType::Float, element_name("step", i).c_str(), on_device);
  return storage;
}

inline void check_sums(const Tensor& sums, size_t count, DeviceCheck on_device) {
  check_dense(sums, ScalarType::Double, static_cast<int64_t>(count), 3, "sums", on_device);
}

// One number for each column of `low`.
inline void check_lines(const Tensors& lines, const Tensors& low, ScalarType type, const char* list,
                        DeviceCheck on_device) {
  for (size_t i = 0; i < lines.size(); ++i) {
    check_columns(lines[i], type, low[i].size(1), element_name(list, i).c_str(), on_device);
  }
}

inline void check_ratios(const Tensors& low, const Tensors& direction, const Tensors& squares, const Tensors& low_gram,
                         const Tensors& ratios, const Tensor& sums, DeviceCheck on_device) {
  const size_t count = low.size();
  check_list(direction, count, "direction");
  check_list(squares, count, "squares");
  check_list_or_none(low_gram, count, "low_gram");
  check_list(ratios, count, "ratios");
  check_sums(sums, count, on_device);
  const ScalarType type = check_low(low, on_device);
  check_like_low(direction, low, type, "direction", on_device);
  check_like_low(low_gram, low, type, "low_gram", on_device);
  check_lines(squares, low, type, "squares", on_device);
  check_lines(ratios, low, type, "ratios", on_device);
}

inline void check_limit(const Tensors& low, const Tensors& direction, const Tensors& ratios, const Tensor& sums,
                        const Tensors& residual_norm, const std::optional<Tensor>& grad_scale,
                        const std::optional<Tensor>& found_inf, DeviceCheck on_device) {
  const size_t count = low.size();
  check_list(direction, count, "direction");
  check_list(ratios, count, "ratios");
  check_list_or_none(residual_norm, count, "residual_norm");
  check_sums(sums, count, on_device);
  check_optional_one(grad_scale, "grad_scale", on_device);
  check_optional_one(found_inf, "found_inf", on_device);
  const ScalarType type = check_low(low, on_device);
  check_like_low(direction, low, type, "direction", on_device);
  check_lines(ratios, low, type, "ratios", on_device);
  for (size_t i = 0; i < residual_norm.size(); ++i) {
    check_one(residual_norm[i], type, element_name("residual_norm", i).c_str(), on_device);
  }
}

inline void check_same_shape(const Tensor& matrix, const Tensor& param, const char* name, DeviceCheck on_device) {
  check_matrix(matrix, param.scalar_type(), name, on_device);
  check_same_sizes(matrix, param, name);
}

// A weight is written by many threads: no two of its elements may share memory.
inline void check_param(const Tensor& param, ScalarType type, const char* name, DeviceCheck on_device) {
  check_matrix(param, type, name, on_device);
  const MatrixStrides strides = matrix_strides(param, name);
  const bool rows_apart = param.size(0) <= 1 || strides.row >= (strides.column == 1 ? param.size(1) : 1);
  const bool columns_apart = param.size(1) <= 1 || strides.column >= (strides.column == 1 ? 1 : param.size(0));
  STD_TORCH_CHECK(param.numel() == 0 || (rows_apart && columns_apart), name,
                  ": expected elements that don't share memory");
}

inline Rounding checked_rounding(int64_t rounding) {
  STD_TORCH_CHECK(rounding >= 0 && rounding <= static_cast<int64_t>(Rounding::kahan),
                  "rounding: expected 0 (nearest), 1 (stochastic) or 2 (Kahan), got ", rounding);
  return static_cast<Rounding>(rounding);
}

inline void check_apply(const Tensors& param, const Tensors& projector, const Tensors& direction, const Tensors& grad,
                        const Tensors& factors, const Tensors& low, const Tensors& compensation, const Tensors& step,
                        const std::vector<int64_t>& seeds, const Tensor& step_factor, const Tensor& lr,
                        const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                        int64_t rounding, DeviceCheck on_device) {
  const size_t count = param.size();
  const bool kahan = checked_rounding(rounding) == Rounding::kahan;
  check_list_or_none(direction, count, "direction");
  check_list_or_none(factors, count, "factors");
  check_list_or_none(low, count, "low");
  check_list(projector, direction.empty() && low.empty() ? 0 : count, "projector");
  check_list(grad, factors.empty() && low.empty() ? 0 : count, "grad");
  check_list(compensation, kahan ? count : 0, "compensation");
  check_list(step, count, "step");
  STD_TORCH_CHECK(seeds.size() == count, "seeds: expected ", count, " numbers, got ", seeds.size());
  check_step_factor(step_factor, count, on_device);
  check_number(lr, "lr", on_device);
  check_optional_one(grad_scale, "grad_scale", on_device);
  check_optional_one(found_inf, "found_inf", on_device);
  for (size_t i = 0; i < count; ++i) {
    const std::string name = element_name("param", i);
    const ScalarType wide = moment_type(data_type(param[i], name.c_str()));
    check_param(param[i], param[0].scalar_type(), name.c_str(), on_device);
    const int64_t length = param[i].size(1);
    int64_t rank = 0;
    if (!projector.empty()) {
      check_basis(projector, i, param[i], on_device);
      rank = rank_of(projector[i]);
    }
    if (!direction.empty()) {
      check_dense(direction[i], wide, rank, length, element_name("direction", i).c_str(), on_device);
    }
    if (!low.empty()) check_dense(low[i], wide, rank, length, element_name("low", i).c_str(), on_device);
    if (!grad.empty()) check_same_shape(grad[i], param[i], element_name("grad", i).c_str(), on_device);
    if (!factors.empty()) check_columns(factors[i], wide, length, element_name("factors", i).c_str(), on_device);
    if (kahan) {
      const std::string buffer = element_name("compensation", i);
      check_same_shape(compensation[i], param[i], buffer.c_str(), on_device);
      for (int64_t dim = 0; dim < 2; ++dim) {
        STD_TORCH_CHECK(param[i].size(dim) <= 1 || compensation[i].stride(dim) == param[i].stride(dim), buffer,
                        ": expected the strides of param");
      }
    }
    check_one(step[i], ScalarType::Float, element_name("step", i).c_str(), on_device);
  }
}

}  // namespace pykern::lowrank
