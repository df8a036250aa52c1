// Host side of the low-rank parts on the CPU.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "lowrank/parts.h"
#include "lowrank/parts_arguments.h"
#include "lowrank/rule.h"

namespace pykern {
namespace {

using lowrank::Tensors;
using OptionalTensor = std::optional<Tensor>;

lowrank::PartMatrix part_matrix(const Tensor& matrix) {
  const lowrank::MatrixStrides strides = lowrank::matrix_strides(matrix, "matrix");
  const bool rows = strides.column == 1;
  return {data_type(matrix, "matrix"), matrix.size(0), matrix.size(1), rows, rows ? strides.row : strides.column};
}

const void* data_or_null(const Tensors& list, size_t index) {
  return list.empty() ? nullptr : list[index].const_data_ptr();
}

void* mutable_data_or_null(const Tensors& list, size_t index) {
  return list.empty() ? nullptr : list[index].mutable_data_ptr();
}

// The rows that projector `index` picks of n, each once or not at all; and of each row by which column, or -1.
const int64_t* picked_rows(const Tensors& projector, size_t index, int64_t n, std::vector<int32_t>& places) {
  const int64_t* rows = input<int64_t>(projector[index]);
  places.assign(n, -1);
  for (int64_t k = 0; k < projector[index].size(0); ++k) {
    if (rows[k] == -1) continue;
    STD_TORCH_CHECK(rows[k] >= 0 && rows[k] < n, lowrank::element_name("projector", index), "[", k,
                    "]: expected a row below ", n, " or -1, got ", rows[k]);
    STD_TORCH_CHECK(places[rows[k]] == -1, lowrank::element_name("projector", index), ": expected each row once, got ",
                    rows[k], " twice");
    places[rows[k]] = static_cast<int32_t>(k);
  }
  return rows;
}

// Before anything is written.
bool check_picked_rows(const Tensors& projector, const Tensors& matrix) {
  if (!lowrank::picks_rows(projector)) return false;
  std::vector<int32_t> places;
  for (size_t i = 0; i < projector.size(); ++i) picked_rows(projector, i, matrix[i].size(0), places);
  return true;
}

void run_project(Tensors matrix, Tensors projector, OptionalTensor grad_scale, Tensors low, Tensors squares,
                 bool maximize) {
  lowrank::check_project(matrix, projector, grad_scale, low, squares, check_cpu);
  const double factor = lowrank::gradient_factor(grad_scale, maximize);
  const bool picks = check_picked_rows(projector, matrix);
  std::vector<int32_t> places;
  for (size_t i = 0; i < matrix.size(); ++i) {
    lowrank::ProjectPart part{};
    part.matrix = part_matrix(matrix[i]);
    part.data = matrix[i].const_data_ptr();
    part.rank = lowrank::rank_of(projector[i]);
    part.projector = projector[i].const_data_ptr();
    if (picks) part.rows = picked_rows(projector, i, part.matrix.n, places);
    part.factor = factor;
    part.low = low[i].mutable_data_ptr();
    part.squares = mutable_data_or_null(squares, i);
    if (part.matrix.length == 0) continue;
    if (part.matrix.type == DataType::f64) {
      lowrank::project_part_double(part);
    } else if (picks) {
      project_rows_part()(part);
    } else {
      STD_TORCH_CHECK(project_part()(part), "low_rank_project: out of memory");
    }
  }
}

void run_rule(Tensors low, Tensors exp_avg, Tensors exp_avg_sq, Tensors exp_avg_scale, Tensors exp_avg_sq_scale,
              Tensors step, Tensors direction, Tensor step_factor, OptionalTensor found_inf, int64_t rule,
              double beta1, double beta2, double eps, bool corrected_eps) {
  lowrank::RulePart part{};
  part.storage = lowrank::check_rule(low, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, step, direction,
                                     step_factor, found_inf, rule, check_cpu);
  part.rule = lowrank::checked_rule(rule);
  part.beta1 = beta1;
  part.beta2 = beta2;
  part.eps = eps;
  const bool corrects = part.rule == lowrank::InnerRule::adamw || part.rule == lowrank::InnerRule::adabelief;
  const bool stopped = lowrank::is_skipped(found_inf);
  for (size_t i = 0; i < low.size(); ++i) {
    double& factor = output<double>(step_factor)[i];
    factor = 1.0;
    if (stopped) {
      std::memset(direction[i].mutable_data_ptr(), 0, direction[i].numel() * direction[i].element_size());
      continue;
    }
    const double count = lowrank::next_count(step[i]);
    if (corrects) {
      const auto corrections = lowrank::bias_corrections(beta1, beta2, count, corrected_eps);
      part.first = corrections.first;
      part.second = corrections.second;
      factor = corrections.rate;
    }
    part.rank = low[i].size(0);
    part.length = low[i].size(1);
    part.low = low[i].const_data_ptr();
    part.exp_avg = exp_avg[i].mutable_data_ptr();
    part.exp_avg_sq = mutable_data_or_null(exp_avg_sq, i);
    part.exp_avg_scale = static_cast<float*>(mutable_data_or_null(exp_avg_scale, i));
    part.exp_avg_sq_scale = static_cast<float*>(mutable_data_or_null(exp_avg_sq_scale, i));
    part.direction = direction[i].mutable_data_ptr();
    if (lowrank::is_double(low[i])) {
      lowrank::rule_part_double(part);
    } else {
      rule_part()(part);
    }
  }
}

void run_ratios(Tensors low, Tensors direction, Tensors squares, Tensors low_gram, Tensors ratios, Tensor sums,
                bool per_tensor, std::optional<double> removed) {
  lowrank::check_ratios(low, direction, squares, low_gram, ratios, sums, check_cpu);
  for (size_t i = 0; i < low.size(); ++i) {
    lowrank::RatiosPart part{};
    part.wide = lowrank::is_double(low[i]);
    part.rank = low[i].size(0);
    part.length = low[i].size(1);
    part.low = low[i].const_data_ptr();
    part.direction = direction[i].const_data_ptr();
    part.squares = squares[i].const_data_ptr();
    part.low_gram = data_or_null(low_gram, i);
    part.per_tensor = per_tensor;
    part.removes = removed.has_value();
    part.removed = removed.value_or(0.0);
    part.ratios = ratios[i].mutable_data_ptr();
    part.sums = output<double>(sums) + 3 * i;
    STD_TORCH_CHECK(ratios_part()(part), "low_rank_ratios: out of memory");
  }
}

void run_limit(Tensors low, Tensors direction, Tensors ratios, Tensor sums, Tensors residual_norm,
               OptionalTensor grad_scale, OptionalTensor found_inf, double scale, std::optional<double> removed,
               bool per_tensor, double amplitude, bool amplitude_first, double growth, bool zero_norm_limits,
               bool maximize) {
  lowrank::check_limit(low, direction, ratios, sums, residual_norm, grad_scale, found_inf, check_cpu);
  const lowrank::LimitRule rule{per_tensor, growth, amplitude, amplitude_first, zero_norm_limits};
  const bool stopped = lowrank::is_skipped(found_inf);
  for (size_t i = 0; i < low.size(); ++i) {
    const double* of_matrix = input<double>(sums) + 3 * i;
    double norm = residual_norm.empty() ? 0.0 : lowrank::number(residual_norm[i]);
    const double factor = lowrank::shared_factor(rule, {of_matrix[0], of_matrix[1], of_matrix[2]},
                                                 residual_norm.empty() ? nullptr : &norm);
    if (!residual_norm.empty() && !stopped) lowrank::set_number(residual_norm[i], norm);
    lowrank::LimitPart part{};
    part.wide = lowrank::is_double(low[i]);
    part.rank = low[i].size(0);
    part.length = low[i].size(1);
    part.low = low[i].const_data_ptr();
    part.direction = direction[i].mutable_data_ptr();
    part.ratios = ratios[i].mutable_data_ptr();
    part.removes = removed.has_value();
    part.scale = scale;
    part.removed = removed.value_or(0.0);
    part.factor = factor;
    part.sign = lowrank::gradient_factor(grad_scale, maximize);
    limit_part()(part);
  }
}

void run_apply(Tensors param, Tensors projector, Tensors direction, Tensors grad, Tensors factors, Tensors low,
               Tensors compensation, Tensors step, std::vector<int64_t> seeds, Tensor step_factor, Tensor lr,
               OptionalTensor grad_scale, OptionalTensor found_inf, double scale, double weight_decay,
               bool decay_after, double sign_scale, int64_t rounding, bool maximize) {
  lowrank::check_apply(param, projector, direction, grad, factors, low, compensation, step, seeds, step_factor, lr,
                       grad_scale, found_inf, rounding, check_cpu);
  if (lowrank::is_skipped(found_inf)) return;
  const double rate = lowrank::number(lr);
  const bool picks = check_picked_rows(projector, param);
  std::vector<int32_t> places;
  for (size_t i = 0; i < param.size(); ++i) {
    if (param[i].numel() == 0) continue;
    lowrank::ApplyPart part{};
    part.param = part_matrix(param[i]);
    part.data = param[i].mutable_data_ptr();
    part.compensation = mutable_data_or_null(compensation, i);
    part.rank = projector.empty() ? 0 : lowrank::rank_of(projector[i]);
    part.projector = data_or_null(projector, i);
    if (picks) {
      part.rows = picked_rows(projector, i, part.param.n, places);
      part.places = places.data();
    }
    part.direction = data_or_null(direction, i);
    part.grad = data_or_null(grad, i);
    part.factors = data_or_null(factors, i);
    part.low = data_or_null(low, i);
    if (part.grad) {
      const lowrank::MatrixStrides strides = lowrank::matrix_strides(grad[i], "grad");
      part.grad_line = part.param.rows ? strides.row : strides.column;
      part.grad_element = part.param.rows ? strides.column : strides.row;
    }
    part.scale = scale;
    part.shrink = rate * weight_decay;
    part.step_size = rate * input<double>(step_factor)[i] * (decay_after ? 1 - rate * weight_decay : 1.0);
    part.sign_scale = sign_scale;
    part.sign_factor = lowrank::gradient_factor(grad_scale, maximize);
    part.rounding = lowrank::checked_rounding(rounding);
    part.seed = static_cast<uint64_t>(seeds[i]);
    part.step = static_cast<uint32_t>(*input<float>(step[i]));
    if (part.param.type == DataType::f64) {
      lowrank::apply_part_double(part);
    } else {
      STD_TORCH_CHECK((picks ? apply_rows_part() : apply_part())(part), "low_rank_apply: out of memory");
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("low_rank_project", TORCH_BOX(&run_project));
  m.impl("low_rank_rule", TORCH_BOX(&run_rule));
  m.impl("low_rank_ratios", TORCH_BOX(&run_ratios));
  m.impl("low_rank_limit", TORCH_BOX(&run_limit));
  m.impl("low_rank_apply", TORCH_BOX(&run_apply));
}

}  // namespace pykern
