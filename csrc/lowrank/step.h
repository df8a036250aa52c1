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
  double sign;  // factor on the gradient: 1 / grad_scale, negative to maximise
};

// Plain Adam of a list of tensors.
struct AdamTensor {
  int64_t size;
  void* param;
  const void* grad;
  void* exp_avg;  // float64 where the parameter is, else float32; so is exp_avg_sq
  void* exp_avg_sq;
  AdamRule rule;
};

struct AdamStep {
  DataType type;
  const AdamTensor* tensors;
  int64_t count;
};

enum class Residual : int { none, fira, apollo_channel, apollo_tensor };

// One matrix [n, length] of a step, its compressed axis first. Of each pair of strides, along n (places) and along
// length (lines), one is 1. The projector is [n, rank], the moments are [rank, length], contiguous.
struct Matrix {
  int64_t n, length, rank;
  void* param;
  int64_t param_place, param_line;
  const void* grad;
  int64_t grad_place, grad_line;
  const void* projector;
  void* exp_avg;  // as in AdamTensor
  void* exp_avg_sq;
  void* residual_norm;  // of the moments' type, negative until known; null: no limit
  AdamRule rule;
};

// What the residual's columns are multiplied by together.
struct LimitRule {
  bool per_tensor;  // |N| / |R| of the whole matrix
  double growth;    // of the residual's norm in a step, at most; zero: no limit
  double amplitude;
  bool amplitude_first;
  bool zero_norm_limits;  // a stored norm of zero limits the next residual, as in the fira package
};

struct LowRankStep {
  DataType type;
  const Matrix* matrices;  // none is empty
  int64_t count;
  Residual residual;
  double scale;
  double removed;  // multiplies up(R) in G - removed * up(R)
  LimitRule limit;
  bool orthonormal;
};

constexpr double kNormEpsilon = 1e-8;

// |N|^2, |R|^2 and the squared norm of the residual before any factor that its columns share.
struct Sums {
  double direction, low, residual;
};

// The factor that all columns of the residual share, and the new stored norm (null: no limit).
PYKERN_INLINE double shared_factor(const LimitRule& rule, const Sums& sums, double* stored) {
  double factor = rule.amplitude_first ? rule.amplitude : 1.0;
  if (rule.per_tensor) factor *= __builtin_sqrt(sums.direction) / (__builtin_sqrt(sums.low) + kNormEpsilon);
  if (stored && rule.growth > 0) {
    const double norm = factor * __builtin_sqrt(sums.residual), before = *stored;
    if (rule.zero_norm_limits ? before < 0 : before <= 0) {
      *stored = norm;
    } else {
      // Written so that a NaN stays.
      const double growth = norm / (before + kNormEpsilon);
      const double limiter = (growth < rule.growth ? rule.growth : growth) / rule.growth;
      factor /= limiter;
      *stored = norm / limiter;
    }
  }
  return rule.amplitude_first ? factor : factor * rule.amplitude;
}

// Float64, straight from the definition: serves comparisons, not speed. False: out of memory.
bool low_rank_step_double(const LowRankStep& step, const Matrix& matrix);
void adam_step_double(const AdamTensor& tensor);

}  // namespace pykern::lowrank

namespace pykern {

// False: out of memory.
PYKERN_SIMD_FUNCTION(bool, low_rank_step, (const lowrank::LowRankStep& step))
PYKERN_SIMD_FUNCTION(bool, adam_step, (const lowrank::AdamStep& step))

}  // namespace pykern
