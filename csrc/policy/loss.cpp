// Host side of policy_loss on the CPU.
#include "policy/loss.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "policy/loss_arguments.h"
#include "policy/loss_sequences.h"

namespace pykern {
namespace {

// In the order of METRICS in pykern/policy/losses.py.
constexpr int64_t kMetrics = 15;

void write_scalar(Tensor& target, int64_t index, double value) {
  if (target.scalar_type() == ScalarType::Double) {
    output<double>(target)[index] = value;
  } else {
    output<float>(target)[index] = static_cast<float>(value);
  }
}

PolicyLossParams loss_params(const LossTensors& tensors, const LossShape& shape, const std::vector<int64_t>& choices,
                             const std::vector<double>& settings) {
  using Choice = LossChoice;
  using Setting = LossSetting;
  const auto pointer = [](const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
  const auto flags = [&](const std::optional<Tensor>& tensor) { return static_cast<const uint8_t*>(pointer(tensor)); };
  PolicyLossParams p{};
  p.logprobs = tensors.logprobs.const_data_ptr();
  p.old_logprobs = tensors.old_logprobs.const_data_ptr();
  p.ref_logprobs = pointer(tensors.ref_logprobs);
  p.anchor_logprobs = pointer(tensors.anchor_logprobs);
  p.rollout_logprobs = pointer(tensors.rollout_logprobs);
  p.entropy = pointer(tensors.entropy);
  p.clip_low = pointer(tensors.clip_low);
  p.clip_high = pointer(tensors.clip_high);
  p.token_weights = pointer(tensors.token_weights);
  p.advantages = {tensors.advantages.const_data_ptr(), shape.advantages_per_token};
  p.second_advantages = {pointer(tensors.second_advantages), shape.second_advantages_per_token};
  p.advantage_weights = {pointer(tensors.advantage_weights), shape.advantage_weights_per_token};
  p.rollout_weights = {pointer(tensors.rollout_weights), shape.rollout_weights_per_token};
  p.mask = flags(tensors.mask);
  p.keep = flags(tensors.keep);
  p.anchor_keep = flags(tensors.anchor_keep);
  p.ratio = static_cast<RatioLevel>(choices[Choice::ratio]);
  p.rule = static_cast<LossRule>(choices[Choice::rule]);
  p.stabilisation = static_cast<Stabilisation>(choices[Choice::stabilisation]);
  p.kl = static_cast<KlEstimator>(choices[Choice::kl]);
  p.anchor = static_cast<KlEstimator>(choices[Choice::anchor]);
  p.kl_gradient = static_cast<KlGradient>(choices[Choice::kl_gradient]);
  p.weight_negative_only = choices[Choice::weight_negative_only] != 0;
  p.rollout_mask = choices[Choice::rollout_rule] != 0;
  p.ratio_low = settings[Setting::ratio_low];
  p.ratio_high = settings[Setting::ratio_high];
  p.ratio_limit = settings[Setting::ratio_limit];
  p.dual_clip = settings[Setting::dual_clip];
  for (int index = 0; index < 4; ++index) p.shape[index] = settings[Setting::shape0 + index];
  p.negative_scale = settings[Setting::negative_scale];
  p.stabilisation_low = settings[Setting::stabilisation_low];
  p.stabilisation_high = settings[Setting::stabilisation_high];
  p.log_ratio_limit = settings[Setting::log_ratio_limit];
  p.sequence_log_ratio_low = settings[Setting::sequence_log_ratio_low];
  p.sequence_log_ratio_high = settings[Setting::sequence_log_ratio_high];
  p.kl_coef = settings[Setting::kl_coef];
  p.kl_log_ratio_limit = settings[Setting::kl_log_ratio_limit];
  p.kl_limit = settings[Setting::kl_limit];
  p.anchor_coef = settings[Setting::anchor_coef];
  p.rollout_low = settings[Setting::rollout_low];
  p.rollout_high = settings[Setting::rollout_high];
  p.entropy_coef = settings[Setting::entropy_coef];
  const bool common = p.stabilisation == Stabilisation::none && p.anchor == KlEstimator::none &&
                      p.kl_gradient == KlGradient::value && !p.keep && !p.entropy && !p.clip_low && !p.clip_high &&
                      !p.token_weights && !p.second_advantages.data && !p.rollout_weights.data;
  const bool plain = common && p.ratio == RatioLevel::token && p.rule == LossRule::clip && p.negative_scale == 1 &&
                     std::isinf(p.ratio_limit);
  p.parts = plain ? LossParts::plain : common ? LossParts::common : LossParts::all;
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run(const LossTensors& tensors, const std::vector<int64_t>& choices,
                                               const std::vector<double>& settings, bool with_gradient) {
  using Setting = LossSetting;
  const Tensor& logprobs = tensors.logprobs;
  const LossShape shape = check_loss(tensors, choices, settings, check_cpu);
  PolicyLossParams params = loss_params(tensors, shape, choices, settings);
  const LossTasks tasks =
      share_loss(logprobs, tensors.mask, tensors.cu_seqlens, params.ratio != RatioLevel::token);
  const std::vector<double> weights =
      tensors.token_weights
          ? std::vector<double>(tasks.lengths.size(), 1.0)
          : sequence_weights(tasks, static_cast<Aggregate>(choices[LossChoice::aggregate]),
                             choices[LossChoice::count_empty] != 0, settings[Setting::denominator],
                             settings[Setting::horizon]);

  Tensor loss = torch::stable::new_empty(logprobs, {});
  Tensor metrics = torch::stable::new_empty(logprobs, {kMetrics});
  const auto gradient = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(logprobs) : torch::stable::new_empty(logprobs, {0});
  };
  Tensor coefficient = gradient(with_gradient);
  Tensor entropy_coefficient = gradient(with_gradient && tensors.entropy);
  std::vector<double> sums(tasks.segments.size() * kLossSums);
  params.coefficient = with_gradient ? coefficient.mutable_data_ptr() : nullptr;
  params.entropy_coefficient = with_gradient && params.entropy ? entropy_coefficient.mutable_data_ptr() : nullptr;
  params.segments = tasks.segments.data();
  params.lengths = tasks.lengths.data();
  params.sequence_weight = weights.data();
  params.sums = sums.data();
  const auto kernel = logprobs.scalar_type() == ScalarType::Double ? policy_loss_f64() : policy_loss_f32();
  parallel_tasks(tasks.tasks(), [&](int64_t task, int) {
    for (int64_t index = tasks.first[task]; index < tasks.first[task + 1]; ++index) kernel(params, index);
  });

  double parts[4] = {}, totals[kLossSums] = {};
  for (size_t index = 0; index < tasks.segments.size(); ++index) {
    const double* of_segment = sums.data() + index * kLossSums;
    const double weight = weights[tasks.segments[index].sequence];
    for (int part = 0; part < 4; ++part) parts[part] += weight * of_segment[kPolicySum + part];
    for (int sum = 0; sum < kLossSums; ++sum) totals[sum] += of_segment[sum];
  }
  // An estimate that is only told may be infinite.
  parts[1] = params.kl_coef == 0 ? 0 : parts[1] * params.kl_coef;
  parts[2] *= params.anchor_coef;
  parts[3] *= -params.entropy_coef;
  const double share = tasks.tokens > 0 ? 1 / static_cast<double>(tasks.tokens) : 0;
  const double kept = params.parts == LossParts::all ? totals[kKept] * share : tasks.tokens > 0 ? 1.0 : 0.0;
  const double values[kMetrics] = {parts[0],
                                   parts[1],
                                   parts[2],
                                   parts[3],
                                   totals[kKlSum] * share,
                                   totals[kAnchorSum] * share,
                                   totals[kEntropySum] * share,
                                   totals[kRatioSum] * share,
                                   -totals[kLogRatioSum] * share,
                                   (totals[kClippedLow] + totals[kClippedHigh]) * share,
                                   totals[kClippedLow] * share,
                                   totals[kClippedHigh] * share,
                                   totals[kDualClipped] * share,
                                   totals[kRolloutWeightSum] * share,
                                   kept};
  for (int64_t index = 0; index < kMetrics; ++index) write_scalar(metrics, index, values[index]);
  write_scalar(loss, 0, parts[0] + parts[1] + parts[2] + parts[3]);
  return {loss, coefficient, entropy_coefficient, metrics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor logprobs, Tensor old_logprobs, Tensor advantages, std::optional<Tensor> mask,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> keep, std::optional<Tensor> ref_logprobs,
    std::optional<Tensor> anchor_logprobs, std::optional<Tensor> anchor_keep, std::optional<Tensor> rollout_logprobs,
    std::optional<Tensor> rollout_weights, std::optional<Tensor> entropy, std::optional<Tensor> clip_low,
    std::optional<Tensor> clip_high, std::optional<Tensor> second_advantages, std::optional<Tensor> advantage_weights,
    std::optional<Tensor> token_weights, std::vector<int64_t> choices, std::vector<double> settings,
    bool with_gradient) {
  return run({logprobs, old_logprobs, advantages, mask, cu_seqlens, keep, ref_logprobs, anchor_logprobs, anchor_keep,
              rollout_logprobs, rollout_weights, entropy, clip_low, clip_high, second_advantages, advantage_weights,
              token_weights},
             choices, settings, with_gradient);
}

Tensor backward(Tensor grad_loss, Tensor coefficient) {
  const ScalarType type = coefficient.scalar_type();
  check_cpu(grad_loss, "grad_loss");
  check_type(grad_loss, type, "grad_loss");
  STD_TORCH_CHECK(grad_loss.numel() == 1, "grad_loss: expected one element");
  check_contiguous(coefficient, "coefficient");
  Tensor gradient = torch::stable::empty_like(coefficient);
  const int64_t count = coefficient.numel(), tasks = (count + kSegmentTokens - 1) / kSegmentTokens;
  const auto scale = scale_f32();
  parallel_tasks(tasks, [&](int64_t task, int) {
    const int64_t begin = task * kSegmentTokens, end = begin + kSegmentTokens < count ? begin + kSegmentTokens : count;
    if (type == ScalarType::Float) {
      scale(input<float>(coefficient) + begin, *input<float>(grad_loss), output<float>(gradient) + begin, end - begin);
    } else {
      const double factor = *input<double>(grad_loss);
      for (int64_t i = begin; i < end; ++i) output<double>(gradient)[i] = input<double>(coefficient)[i] * factor;
    }
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("policy_loss_forward", TORCH_BOX(&forward));
  m.impl("policy_loss_backward", TORCH_BOX(&backward));
}

}  // namespace pykern
