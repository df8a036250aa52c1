// The residual's factors on the gradient's columns and their limit on the GPU, over lists, as plain parameters.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern::lowrank {

// A block of threads takes eight threads' sixteen bytes of columns, over all the rank.
constexpr int kStripThreads = 8;
inline int64_t strip_columns(DataType type) { return kStripThreads * (type == DataType::f64 ? 2 : 4); }
inline int64_t strips(DataType type, int64_t length) {
  return (length + strip_columns(type) - 1) / strip_columns(type);
}

// One matrix [rank, length], float32 or float64 throughout, without gaps.
struct RatioMatrix {
  const void* low;
  const void* low_gram;  // P^T P R, or null where P is orthonormal
  void* direction;       // N; launch_limit puts what is to be projected up in its place
  const void* squares;   // [length]: of the columns of G
  void* ratios;          // [length]: phi; launch_limit puts the factors in their place
  double* strip_sums;    // [strips, 3]
  double* sums;          // [3]
  void* residual_norm;   // null: no limit
  double* limit;         // one number between the two kernels of the limit: what phi is multiplied by
  int64_t rank, length;
  bool packs;  // sixteen-byte accesses are possible; the launcher sets it
};

struct RatioParams {
  DataType type;  // f32 or f64
  const float* grad_scale;
  const float* found_inf;
  double scale, removed, amplitude, growth;
  // Without `removes` the residual is G, scaled, and the direction stays as it is.
  bool removes, per_tensor, amplitude_first, zero_norm_limits, maximize;
};

// phi, and the three sums of each strip.
const char* launch_ratios(const RatioParams& params, const RatioMatrix* matrices, int64_t count, Stream stream);
// Adds up the strips' sums.
const char* launch_ratio_sums(const RatioParams& params, const RatioMatrix* matrices, int64_t count, Stream stream);
// Resolves the limit of each matrix, and stores its residual's norm; adds up the strips' sums before if `from_strips`.
const char* launch_limiter(const RatioParams& params, const RatioMatrix* matrices, int64_t count, bool from_strips,
                           Stream stream);
// The combined direction, and the factors.
const char* launch_limit(const RatioParams& params, const RatioMatrix* matrices, int64_t count, Stream stream);

}  // namespace pykern::lowrank
