// Fira's residual on the GPU, as plain parameters.
//
// A line is a row of the weight (right side) or a column (left side). With r the low-rank gradient of a line,
// n its direction and g the gradient, the residual is factor * (g - removed * up(r)), factor = |n| / |r|. Its
// squared norm needs no full-size array: factor^2 (|g|^2 - 2 removed |r|^2 + removed^2 r^T (P^T P) r).
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"
#include "kernels/lowrank/adam.h"

namespace pykern::lowrank {

constexpr int kResidualThreads = 256;
constexpr int64_t kSquareRows = 256;  // rows of the gradient in one partial sum of a column

// Partial sums of the gradient's squares that each line has, and blocks of lines.
inline int64_t square_parts(bool right, int64_t rows) { return right ? 1 : (rows + kSquareRows - 1) / kSquareRows; }
inline int64_t line_blocks(int64_t lines) { return (lines + kResidualThreads - 1) / kResidualThreads; }

// All arrays of numbers are of the moments' type: float64 where `type` is, else float32.
struct ResidualParams {
  DataType type;
  bool right;
  int64_t rows, columns, rank;
  AdamRule* rule;
  const void* grad;
  int64_t grad_stride;
  const void* low;       // [rows, rank] or [rank, columns], without gaps, as are the next four
  const void* low_gram;  // low (P^T P), or (P^T P) low
  void* exp_avg;
  void* exp_avg_sq;
  void* combined;        // scale * n - removed * limit * factor * r, of `type`
  void* square_parts;    // [square_parts(right, rows), lines]
  void* factors;         // [lines]
  void* low_squares;     // [lines]
  void* gram_squares;    // [lines]: r^T (P^T P) r
  double* block_sums;    // [line_blocks(lines)]
  void* residual_norm;
  double scale, removed;
  bool zero_norm_limits;  // a stored norm of zero limits the next residual, as in the fira package
};

// Advances the moments, then resolves the norms and the limiter, then fills `combined`.
const char* launch_residual(const ResidualParams& params, Stream stream);

}  // namespace pykern::lowrank
