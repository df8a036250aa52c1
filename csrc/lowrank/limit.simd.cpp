// The residual's ratios and its limit, a block of columns at a time. In float32 or float64 throughout: plain loops
// along the columns, which the compiler turns into vectors.
#include "common/parallel.h"
#include "common/scratch.h"
#include "lowrank/parts.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::LimitPart;
using lowrank::RatiosPart;

constexpr int64_t kColumns = 256;

PYKERN_INLINE float root(float value) { return __builtin_sqrtf(value); }
PYKERN_INLINE double root(double value) { return __builtin_sqrt(value); }

// Below this part of a column's square, a difference of squares is rounding and counts as nothing, lest the limiter
// hold later residuals to it.
template <class R>
constexpr R kNoise = R(1e-5);
template <>
inline constexpr double kNoise<double> = 1e-14;

template <class R>
void block_ratios(const RatiosPart& part, int64_t begin, double* sums) {
  const int64_t columns = part.length - begin < kColumns ? part.length - begin : kColumns;
  const R* low = static_cast<const R*>(part.low) + begin;
  const R* direction = static_cast<const R*>(part.direction) + begin;
  const R* squares = static_cast<const R*>(part.squares) + begin;
  const R* gram = static_cast<const R*>(part.low_gram);
  R* ratios = static_cast<R*>(part.ratios) + begin;
  R low_squares[kColumns] = {}, direction_squares[kColumns] = {}, gram_squares[kColumns] = {};
  for (int64_t k = 0; k < part.rank; ++k) {
    const R* r = low + k * part.length;
    const R* d = direction + k * part.length;
    for (int64_t j = 0; j < columns; ++j) {
      low_squares[j] += r[j] * r[j];
      direction_squares[j] += d[j] * d[j];
    }
    if (!gram) continue;
    const R* g = gram + begin + k * part.length;
    for (int64_t j = 0; j < columns; ++j) gram_squares[j] += r[j] * g[j];
  }
  const double removed = part.removed;
  for (int64_t j = 0; j < columns; ++j) {
    const R ratio = part.per_tensor ? R(1) : root(direction_squares[j]) / (root(low_squares[j]) + R(1e-8));
    double rest = squares[j];
    if (part.removes) {
      const double twice = gram ? gram_squares[j] : low_squares[j];
      rest += removed * removed * twice - 2 * removed * static_cast<double>(low_squares[j]);
      if (rest < static_cast<double>(kNoise<R>) * squares[j]) rest = 0;
    }
    ratios[j] = ratio;
    sums[0] += direction_squares[j];
    sums[1] += low_squares[j];
    sums[2] += static_cast<double>(ratio) * ratio * rest;
  }
}

template <class R>
bool ratios_typed(const RatiosPart& part) {
  const int64_t blocks = ceil_div(part.length, kColumns);
  const Scratch memory(static_cast<size_t>(blocks) * 3 * sizeof(double));
  double* parts = memory.get<double>();
  if (!parts) return false;
  parallel_tasks(blocks, [&](int64_t block, int) {
    double sums[3] = {};
    block_ratios<R>(part, block * kColumns, sums);
    for (int i = 0; i < 3; ++i) parts[block * 3 + i] = sums[i];
  });
  for (int i = 0; i < 3; ++i) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += parts[block * 3 + i];
    part.sums[i] = total;
  }
  return true;
}

template <class R>
void limit_typed(const LimitPart& part) {
  const R scale = static_cast<R>(part.scale), removed = static_cast<R>(part.removed);
  parallel_tasks(ceil_div(part.length, kColumns), [&](int64_t block, int) {
    const int64_t begin = block * kColumns;
    const int64_t columns = part.length - begin < kColumns ? part.length - begin : kColumns;
    R* ratios = static_cast<R*>(part.ratios) + begin;
    R taken[kColumns];
    for (int64_t j = 0; j < columns; ++j) {
      const R factor = ratios[j] * static_cast<R>(part.factor);
      taken[j] = removed * factor;
      ratios[j] = factor * static_cast<R>(part.sign);
    }
    if (!part.removes) return;
    for (int64_t k = 0; k < part.rank; ++k) {
      const R* r = static_cast<const R*>(part.low) + begin + k * part.length;
      R* d = static_cast<R*>(part.direction) + begin + k * part.length;
      for (int64_t j = 0; j < columns; ++j) d[j] = scale * d[j] - taken[j] * r[j];
    }
  });
}

}  // namespace

bool ratios_part(const RatiosPart& part) {
  return part.wide ? ratios_typed<double>(part) : ratios_typed<float>(part);
}

void limit_part(const LimitPart& part) {
  if (part.wide) {
    limit_typed<double>(part);
  } else {
    limit_typed<float>(part);
  }
}

}  // namespace pykern::PYKERN_SIMD
