// The parts of a low-rank step on the CPU, one matrix at a time, as plain parameters. No torch header here.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/numeric.h"
#include "kernels/lowrank/parts_kinds.h"

namespace pykern::lowrank {

// A matrix [n, length] whose unit stride is along either axis. Memory is walked in lines: rows if `rows`, else columns,
// `stride` elements apart.
struct PartMatrix {
  DataType type;
  int64_t n, length;
  bool rows;
  int64_t stride;

  int64_t lines() const { return rows ? n : length; }
  int64_t line_size() const { return rows ? length : n; }
};

// low = factor * P^T matrix [rank, length], squares = factor^2 times the columns' squared norms. P is [n, rank], or its
// column k is zero but for a one in row rows[k], if that is not -1. `wide` numbers are float64 where the matrix is,
// else float32.
struct ProjectPart {
  PartMatrix matrix;
  const void* data;
  int64_t rank;
  const void* projector;
  const int64_t* rows;  // [rank], or null where P is dense
  double factor;
  void* low;
  void* squares;  // or null
};

// One inner rule on moments [rank, length]. N = first * m / (second * sqrt(v) + eps) for the rules with two moments.
struct RulePart {
  InnerRule rule;
  MomentStorage storage;
  double beta1, beta2, eps;
  double first, second;
  int64_t rank, length;
  const void* low;
  void* exp_avg;
  void* exp_avg_sq;  // null for the rules with one moment
  float* exp_avg_scale;  // of 8-bit moments
  float* exp_avg_sq_scale;
  void* direction;
};

// Wide tensors [rank, length] and [length].
struct RatiosPart {
  bool wide;  // float64
  int64_t rank, length;
  const void* low;
  const void* direction;
  const void* squares;
  const void* low_gram;  // null: the basis is orthonormal
  bool per_tensor;
  bool removes;  // else the residual is the scaled gradient itself
  double removed;
  void* ratios;
  double* sums;  // [3]
};

// direction = scale * direction - removed * c * low (untouched where nothing is removed), with c = factor * ratios;
// ratios = sign * c.
struct LimitPart {
  bool wide;
  int64_t rank, length;
  const void* low;
  void* direction;
  void* ratios;
  bool removes;
  double scale, removed, factor, sign;
};

// W - step_size * (scale up(direction) + G factors + sign_scale sign(sign_factor G - up(low))) - shrink * W. The
// decay is a small change of W: 1 - decay keeps more digits than decay.
struct ApplyPart {
  PartMatrix param;
  void* data;
  void* compensation;  // of Kahan's rounding, laid out as the weight
  int64_t rank;
  const void* projector;
  const int64_t* rows;    // as in ProjectPart, no row twice
  const int32_t* places;  // [n], where there are `rows`: the column of P whose one is in this row, or -1
  const void* direction;  // null where absent, as is each of the next three
  const void* grad;
  const void* factors;
  const void* low;
  int64_t grad_line, grad_element;  // strides of G along the weight's lines and in them
  double scale, shrink, step_size, sign_scale, sign_factor;
  Rounding rounding;
  uint64_t seed;
  uint32_t step;
};

// Float64, straight from the definition: serves comparisons, not speed.
void project_part_double(const ProjectPart& part);
void rule_part_double(const RulePart& part);
void apply_part_double(const ApplyPart& part);

}  // namespace pykern::lowrank

namespace pykern {

// False: out of memory.
PYKERN_SIMD_FUNCTION(bool, project_part, (const lowrank::ProjectPart& part))
PYKERN_SIMD_FUNCTION(bool, apply_part, (const lowrank::ApplyPart& part))
// The same of projectors that pick rows.
PYKERN_SIMD_FUNCTION(void, project_rows_part, (const lowrank::ProjectPart& part))
PYKERN_SIMD_FUNCTION(bool, apply_rows_part, (const lowrank::ApplyPart& part))
PYKERN_SIMD_FUNCTION(bool, ratios_part, (const lowrank::RatiosPart& part))
PYKERN_SIMD_FUNCTION(void, rule_part, (const lowrank::RulePart& part))
PYKERN_SIMD_FUNCTION(void, limit_part, (const lowrank::LimitPart& part))

}  // namespace pykern
