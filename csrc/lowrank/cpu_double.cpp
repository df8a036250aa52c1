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

void adam_step_double(const AdamTensor& tensor) {
  double* param = static_cast<double*>(tensor.param);
  const double* grad = static_cast<const double*>(tensor.grad);
  double* first = static_cast<double*>(tensor.exp_avg);
  double* second = static_cast<double*>(tensor.exp_avg_sq);
  constexpr int64_t kChunk = 16384;
  parallel_tasks(ceil_div(tensor.size, kChunk), [&](int64_t task, int) {
    const int64_t end = (task + 1) * kChunk < tensor.size ? (task + 1) * kChunk : tensor.size;
    for (int64_t i = task * kChunk; i < end; ++i) {
      const double direction = advance(tensor.rule, tensor.rule.sign * grad[i], first + i, second + i);
      param[i] = tensor.rule.decay * param[i] - tensor.rule.step_size * direction;
    }
  });
}

// A line runs over the long axis, a place over the compressed one.
bool low_rank_step_double(const LowRankStep& step, const Matrix& matrix) {
  const int64_t n = matrix.n, length = matrix.length, rank = matrix.rank;
  const AdamRule& rule = matrix.rule;
  const bool fira = step.residual == Residual::fira, scaled = step.residual != Residual::none;
  const double* projector = static_cast<const double*>(matrix.projector);
  double* first = static_cast<double*>(matrix.exp_avg);
  double* second = static_cast<double*>(matrix.exp_avg_sq);

  const Scratch low_memory(length * rank * sizeof(double)), update_memory(length * rank * sizeof(double));
  const Scratch ratio_memory(length * sizeof(double)), sums_memory(length * sizeof(Sums));
  double* low = low_memory.get<double>();
  double* update = update_memory.get<double>();
  double* ratio = ratio_memory.get<double>();
  Sums* sums = sums_memory.get<Sums>();
  if (!low || !update || !ratio || !sums) return false;

  const auto up = [&](const double* vector, int64_t place) {
    double sum = 0;
    for (int64_t k = 0; k < rank; ++k) sum += vector[k] * projector[place * rank + k];
    return sum;
  };
  const auto gradient = [&](int64_t place, int64_t line) {
    return rule.sign * static_cast<const double*>(matrix.grad)[place * matrix.grad_place + line * matrix.grad_line];
  };
  parallel_tasks(length, [&](int64_t line, int) {
    double* r = low + line * rank;
    double* direction = update + line * rank;
    Sums mine{};
    for (int64_t k = 0; k < rank; ++k) {
      double sum = 0;
      for (int64_t place = 0; place < n; ++place) sum += gradient(place, line) * projector[place * rank + k];
      r[k] = sum;
      direction[k] = advance(rule, sum, first + k * length + line, second + k * length + line);
      mine.low += sum * sum;
      mine.direction += direction[k] * direction[k];
    }
    if (!scaled) return;
    ratio[line] = step.residual == Residual::apollo_tensor
                      ? 1.0
                      : std::sqrt(mine.direction) / (std::sqrt(mine.low) + kNormEpsilon);
    for (int64_t place = 0; place < n; ++place) {
      const double rest = gradient(place, line) - (fira ? step.removed * up(r, place) : 0);
      mine.residual += ratio[line] * rest * ratio[line] * rest;
    }
    sums[line] = mine;
  });
  double shared = 0;
  if (scaled) {
    Sums total{};
    for (int64_t line = 0; line < length; ++line) {
      total.direction += sums[line].direction;
      total.low += sums[line].low;
      total.residual += sums[line].residual;
    }
    shared = shared_factor(step.limit, total, static_cast<double*>(matrix.residual_norm));
  }
  parallel_tasks(length, [&](int64_t line, int) {
    for (int64_t place = 0; place < n; ++place) {
      double direction = 0;
      if (fira || !scaled) direction = step.scale * up(update + line * rank, place);
      if (scaled) {
        const double rest = gradient(place, line) - (fira ? step.removed * up(low + line * rank, place) : 0);
        direction += rest * ratio[line] * shared;
      }
      double& weight = static_cast<double*>(matrix.param)[place * matrix.param_place + line * matrix.param_line];
      weight = rule.decay * weight - rule.step_size * direction;
    }
  });
  return true;
}

}  // namespace pykern::lowrank
