// The low-rank parts in float64, straight from their definitions.
#include <cmath>

#include "common/parallel.h"
#include "common/scratch.h"
#include "lowrank/parts.h"

namespace pykern::lowrank {
namespace {

const double* doubles(const void* data) { return static_cast<const double*>(data); }
double* doubles(void* data) { return static_cast<double*>(data); }

double sign_of(double value) { return value > 0 ? 1.0 : value < 0 ? -1.0 : value; }

// The direction; the moments advance.
double advance(const RulePart& part, double gradient, double* first, double* second) {
  const double before = *first;
  if (part.rule == InnerRule::momentum) return *first = part.beta1 * before + gradient;
  if (part.rule == InnerRule::lion) {
    *first = part.beta2 * before + (1 - part.beta2) * gradient;
    return sign_of(part.beta1 * before + (1 - part.beta1) * gradient);
  }
  *first = part.beta1 * before + (1 - part.beta1) * gradient;
  const bool belief = part.rule == InnerRule::adabelief;
  const double surprise = belief ? gradient - *first : gradient;
  *second = part.beta2 * *second + (1 - part.beta2) * surprise * surprise + (belief ? part.eps : 0.0);
  return part.first * *first / (part.second * std::sqrt(*second) + part.eps);
}

}  // namespace

void project_part_double(const ProjectPart& part) {
  const PartMatrix& matrix = part.matrix;
  const int64_t row = matrix.rows ? matrix.stride : 1, column = matrix.rows ? 1 : matrix.stride;
  parallel_tasks(matrix.length, [&](int64_t j, int) {
    const double* from = doubles(part.data) + j * column;
    for (int64_t k = 0; k < part.rank; ++k) {
      double sum = 0;
      if (part.rows) {
        if (part.rows[k] >= 0) sum = from[part.rows[k] * row];
      } else {
        for (int64_t i = 0; i < matrix.n; ++i) sum += doubles(part.projector)[i * part.rank + k] * from[i * row];
      }
      doubles(part.low)[k * matrix.length + j] = part.factor * sum;
    }
    if (!part.squares) return;
    double sum = 0;
    for (int64_t i = 0; i < matrix.n; ++i) sum += from[i * row] * from[i * row];
    doubles(part.squares)[j] = part.factor * part.factor * sum;
  });
}

void rule_part_double(const RulePart& part) {
  constexpr int64_t kChunk = 16384;
  const int64_t size = part.rank * part.length;
  parallel_tasks(ceil_div(size, kChunk), [&](int64_t task, int) {
    const int64_t end = (task + 1) * kChunk < size ? (task + 1) * kChunk : size;
    for (int64_t i = task * kChunk; i < end; ++i) {
      double* second = part.exp_avg_sq ? doubles(part.exp_avg_sq) + i : nullptr;
      doubles(part.direction)[i] = advance(part, doubles(part.low)[i], doubles(part.exp_avg) + i, second);
    }
  });
}

void apply_part_double(const ApplyPart& part) {
  const PartMatrix& param = part.param;
  const int64_t length = param.length;
  parallel_tasks(param.lines(), [&](int64_t line, int) {
    for (int64_t element = 0; element < param.line_size(); ++element) {
      const int64_t i = param.rows ? line : element, j = param.rows ? element : line;
      const auto up = [&](const void* low) {
        if (part.rows) return part.places[i] < 0 ? 0.0 : doubles(low)[part.places[i] * length + j];
        double sum = 0;
        for (int64_t k = 0; k < part.rank; ++k) {
          sum += doubles(part.projector)[i * part.rank + k] * doubles(low)[k * length + j];
        }
        return sum;
      };
      double update = part.direction ? part.scale * up(part.direction) : 0.0;
      if (part.grad) {
        const double gradient = doubles(part.grad)[line * part.grad_line + element * part.grad_element];
        if (part.factors) update += gradient * doubles(part.factors)[j];
        if (part.low) update += part.sign_scale * sign_of(part.sign_factor * gradient - up(part.low));
      }
      const int64_t at = line * param.stride + element;
      double& weight = doubles(part.data)[at];
      const double change = -part.shrink * weight - part.step_size * update;
      if (part.rounding == Rounding::kahan) {
        double& compensation = doubles(part.compensation)[at];
        const double wanted = compensation + change, before = weight;
        weight = before + wanted;
        compensation = wanted - (weight - before);
      } else {
        weight += change;
      }
    }
  });
}

}  // namespace pykern::lowrank
