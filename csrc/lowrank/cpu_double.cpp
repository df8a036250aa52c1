// The steps in float64, straight from the definition.
#include <cmath>

#include "common/parallel.h"
#include "common/scratch.h"
#include "lowrank/step.h"

namespace pykern::lowrank {
namespace {

double advance(const AdamRule& rule, double gradient, double* first, double* second) {
  *first = rule.beta1 * *first + (1 - rule.beta1) * gradient;
  *second = rule.beta2 * *second + (1 - rule.beta2) * gradient * gradient;
  return rule.first * *first / (rule.second * std::sqrt(*second) + rule.eps);
}

}  // namespace

void adam_step_double(const AdamStep& step) {
  double* param = static_cast<double*>(step.param);
  const double* grad = static_cast<const double*>(step.grad);
  double* first = static_cast<double*>(step.exp_avg);
  double* second = static_cast<double*>(step.exp_avg_sq);
  constexpr int64_t kChunk = 16384;
  parallel_tasks(ceil_div(step.size, kChunk), [&](int64_t task, int) {
    const int64_t end = (task + 1) * kChunk < step.size ? (task + 1) * kChunk : step.size;
    for (int64_t i = task * kChunk; i < end; ++i) {
      const double direction = advance(step.rule, step.rule.sign * grad[i], first + i, second + i);
      param[i] = step.rule.decay * param[i] - step.rule.step_size * direction;
    }
  });
}

// Both sides at once: `line` runs over the axis that is kept (rows if right, else columns), `place`
// along the axis that is compressed.
bool low_rank_step_double(const LowRankStep& step) {
  const int64_t rank = step.rank;
  const int64_t lines = step.right ? step.rows : step.columns, places = step.right ? step.columns : step.rows;
  const int64_t param_line = step.right ? step.param_stride : 1, param_place = step.right ? 1 : step.param_stride;
  const int64_t grad_line = step.right ? step.grad_stride : 1, grad_place = step.right ? 1 : step.grad_stride;
  const int64_t state_line = step.right ? rank : 1, state_direction = step.right ? 1 : step.columns;
  double* param = static_cast<double*>(step.param);
  const double* grad = static_cast<const double*>(step.grad);
  const double* projector = static_cast<const double*>(step.projector);
  double* first = static_cast<double*>(step.exp_avg);
  double* second = static_cast<double*>(step.exp_avg_sq);
  double* norm = static_cast<double*>(step.residual_norm);

  const Scratch low_memory(lines * rank * sizeof(double)), update_memory(lines * rank * sizeof(double));
  const Scratch factor_memory(lines * sizeof(double)), square_memory(lines * sizeof(double));
  double* low = low_memory.get<double>();
  double* update = update_memory.get<double>();
  double* factor = factor_memory.get<double>();
  double* square = square_memory.get<double>();
  if (!low || !update || !factor || !square) return false;

  const auto up = [&](const double* vector, int64_t place) {
    double sum = 0;
    for (int64_t k = 0; k < rank; ++k) sum += vector[k] * projector[place * rank + k];
    return sum;
  };
  parallel_tasks(lines, [&](int64_t line, int) {
    const double* from = grad + line * grad_line;
    double* r = low + line * rank;
    double* n = update + line * rank;
    double r_square = 0, n_square = 0;
    for (int64_t k = 0; k < rank; ++k) {
      double sum = 0;
      for (int64_t place = 0; place < places; ++place) sum += from[place * grad_place] * projector[place * rank + k];
      r[k] = step.rule.sign * sum;
      const int64_t state = line * state_line + k * state_direction;
      n[k] = advance(step.rule, r[k], first + state, second + state);
      r_square += r[k] * r[k];
      n_square += n[k] * n[k];
    }
    if (!norm) return;
    factor[line] = std::sqrt(n_square) / (std::sqrt(r_square) + kNormEpsilon);
    double sum = 0;
    for (int64_t place = 0; place < places; ++place) {
      const double rest = (step.rule.sign * from[place * grad_place] - step.removed * up(r, place)) * factor[line];
      sum += rest * rest;
    }
    square[line] = sum;
  });
  double limit = 0;
  if (norm) {
    double total = 0;
    for (int64_t line = 0; line < lines; ++line) total += square[line];
    limit = limit_residual(std::sqrt(total), norm, step.zero_norm_limits);
  }
  parallel_tasks(lines, [&](int64_t line, int) {
    for (int64_t place = 0; place < places; ++place) {
      double direction = step.scale * up(update + line * rank, place);
      if (norm) {
        const double gradient = step.rule.sign * grad[line * grad_line + place * grad_place];
        direction += (gradient - step.removed * up(low + line * rank, place)) * factor[line] * limit;
      }
      double* weight = param + line * param_line + place * param_place;
      *weight = step.rule.decay * *weight - step.rule.step_size * direction;
    }
  });
  return true;
}

}  // namespace pykern::lowrank
