// The optimizer steps, as plain parameters. No torch header here.
#pragma once

#include <cstdint>

#include "common/cpu_level.h"
#include "common/numeric.h"

namespace pykern::lowrank {

// One Adam update: N = first * m / (second * sqrt(v) + eps), w <- decay * w - step_size * direction.
struct AdamRule {
  double beta1, beta2;
  double first, second, eps;
  double step_size, decay;
  double sign;  // -1 to maximise
};

struct AdamStep {
  DataType type;
  int64_t size;
  void* param;
  const void* grad;
  void* exp_avg;  // float64 where the parameter is, else float32; so is exp_avg_sq
  void* exp_avg_sq;
  AdamRule rule;
};

// param and grad are [rows, columns] with unit column stride, of one type, as is the projector:
// [columns, rank] if `right`, else [rows, rank], contiguous. The moments are [rows, rank] if
// `right`, else [rank, columns], contiguous.
struct LowRankStep {
  DataType type;
  int64_t rows, columns, rank;
  bool right;
  void* param;
  int64_t param_stride;
  const void* grad;
  int64_t grad_stride;
  const void* projector;
  void* exp_avg;
  void* exp_avg_sq;
  AdamRule rule;
  double scale;
  // Fira's residual, where residual_norm is not null. `removed` multiplies up(R) in G - removed * up(R);
  // residual_norm is of the moments' type and negative until the first norm is known.
  void* residual_norm;
  double removed;
  bool zero_norm_limits;  // a stored norm of zero limits the next residual, as in the fira package
};

constexpr double kNormEpsilon = 1e-8;
constexpr double kGrowthLimit = 1.01;

// The limiter: the factor on the residual of norm `norm`, and the new stored norm.
PYKERN_INLINE double limit_residual(double norm, double* stored, bool zero_norm_limits) {
  const double before = *stored;
  if (zero_norm_limits ? before < 0 : before <= 0) {
    *stored = norm;
    return 1.0;
  }
  const double growth = norm / (before + kNormEpsilon);
  const double limiter = (growth < kGrowthLimit ? kGrowthLimit : growth) / kGrowthLimit;
  *stored = norm / limiter;
  return 1.0 / limiter;
}

// Float64, straight from the definition: serves comparisons, not speed. False: out of memory.
bool low_rank_step_double(const LowRankStep& step);
void adam_step_double(const AdamStep& step);

}  // namespace pykern::lowrank

namespace pykern {

// False: out of memory.
PYKERN_SIMD_FUNCTION(bool, low_rank_step, (const lowrank::LowRankStep& step))
PYKERN_SIMD_FUNCTION(void, adam_step, (const lowrank::AdamStep& step))

}  // namespace pykern
