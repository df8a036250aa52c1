// rollout_correction on the CPU: a task per sequence, whose tokens are looked at twice.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "policy/rollout_arguments.h"

namespace pykern {
namespace {

template <class T>
struct Correction {
  const T *old_logprobs, *rollout_logprobs;
  TokenBatch batch;
  RolloutRules rules;
  T* weights;  // null for none
  bool* keep;

  void sequence(int64_t index, double* columns) const {
    double sums[kTokenSums] = {};
    T largest[2] = {0, 0};
    for_tokens(batch, index, [&](int64_t token) {
      measure_token(rules, old_logprobs[token], rollout_logprobs[token], sums, largest);
    });
    const SequenceVerdict verdict = judge_sequence(rules, sums, largest[0], largest[1]);
    const bool per_token = rules.weight == RolloutWeight::token;
    double of_weights[kWeightSums] = {};
    T range[2] = {static_cast<T>(-HUGE_VAL), static_cast<T>(HUGE_VAL)};
    const int64_t end = sequence_begin(batch, index + 1);
    for (int64_t token = sequence_begin(batch, index); token < end; ++token) {
      TokenVerdict<T> of_token{T(0), false};
      if (!batch.mask || batch.mask[token]) {
        of_token = judge_token(rules, verdict, old_logprobs[token], rollout_logprobs[token], of_weights, range);
      }
      keep[token] = of_token.keep;
      if (per_token) weights[token] = of_token.weight;
    }
    const double weight = fill_columns(rules, sums, verdict, of_weights, range[0], range[1], columns);
    if (weights && !per_token) weights[index] = static_cast<T>(weight);
  }

  void run(T* metrics) const {
    std::vector<double> columns(batch.sequences * kPaddedColumns);
    parallel_tasks(batch.sequences,
                   [&](int64_t index, int) { sequence(index, columns.data() + index * kPaddedColumns); });
    double totals[kPaddedColumns];
    for (int column = 0; column < kPaddedColumns; ++column) {
      totals[column] = rollout_identity(column);
      for (int64_t index = 0; index < batch.sequences; ++index) {
        totals[column] = rollout_join(column, totals[column], columns[index * kPaddedColumns + column]);
      }
    }
    write_metrics(rules, totals, metrics);
    if (!rules.normalize || !weights) return;
    const T divisor = static_cast<T>(rollout_divisor(rules, totals));
    const int64_t count = rules.weight == RolloutWeight::token ? batch.tokens : batch.sequences;
    for (int64_t index = 0; index < count; ++index) weights[index] /= divisor;
  }
};

std::tuple<Tensor, Tensor, Tensor> rollout_correction(Tensor old_logprobs, Tensor rollout_logprobs,
                                                      std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                                      int64_t weight, bool weight_mask, int64_t criteria,
                                                      bool unscored_are_one, bool normalize,
                                                      std::vector<double> settings) {
  const int64_t sequences = check_batch(old_logprobs, mask, cu_seqlens, "old_logprobs", check_cpu);
  check_like(rollout_logprobs, old_logprobs, "rollout_logprobs", check_cpu);
  const RolloutRules rules = rollout_rules(weight, weight_mask, criteria, unscored_are_one, normalize, settings);
  const TokenBatch batch = cpu_batch(old_logprobs, mask, cu_seqlens, sequences);
  Tensor keep = torch::stable::new_empty(old_logprobs, old_logprobs.sizes(), ScalarType::Bool);
  Tensor weights = rules.weight == RolloutWeight::token
                       ? torch::stable::empty_like(old_logprobs)
                       : torch::stable::new_empty(old_logprobs, {rules.weight == RolloutWeight::none ? 0 : sequences});
  Tensor metrics = torch::stable::new_empty(old_logprobs, {kRolloutMetrics});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Correction<T>{input<T>(old_logprobs), input<T>(rollout_logprobs), batch, rules,
                  rules.weight == RolloutWeight::none ? nullptr : output<T>(weights), output<bool>(keep)}
        .run(output<T>(metrics));
  };
  if (old_logprobs.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {weights, keep, metrics};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("rollout_correction", TORCH_BOX(&rollout_correction)); }

}  // namespace pykern
