// Host side of policy_loss on a GPU. The bounds of packed sequences stay on the device, unchecked.
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda.h"
#include "kernels/policy/loss.h"
#include "policy/loss_arguments.h"

namespace pykern {
namespace {

using Choice = LossChoice;
using Setting = LossSetting;
using MaybeTensor = std::optional<Tensor>;

// What the kernels write on their way.
struct LossWorkspace {
  Tensor counters, mask_bits, part_sums, block_sums;
};

// The grid and the memory that follow from all other parameters; keep what it returns until the launch.
LossWorkspace add_workspace(LossParams& params, DataType type, const Tensor& like) {
  params.grid = loss_grid(type, params);
  const int64_t words = params.mask ? loss_mask_words(params.tokens, params.sequences) : 0;
  const int64_t part_sums = params.sequences * params.grid.parts * loss_part_sums(params);
  LossWorkspace space{cuda::new_zeros(like, {kSequenceLengths + params.sequences}, ScalarType::Long),
                      cuda::empty(like, {words}, ScalarType::Int), cuda::empty(like, {part_sums}, ScalarType::Double),
                      cuda::empty(like, {params.grid.blocks * kBlockSums}, ScalarType::Double)};
  params.counters = cuda::workspace<unsigned long long>(space.counters);
  params.mask_bits = cuda::workspace<uint32_t>(space.mask_bits);
  params.part_sums = cuda::workspace<double>(space.part_sums);
  params.block_sums = cuda::workspace<double>(space.block_sums);
  return space;
}

LossBounds<double> loss_bounds(const std::vector<double>& settings) {
  return {settings[Setting::ratio_low],
          settings[Setting::ratio_high],
          settings[Setting::ratio_limit],
          settings[Setting::dual_clip],
          {settings[Setting::shape0], settings[Setting::shape1], settings[Setting::shape2], settings[Setting::shape3]},
          settings[Setting::negative_scale],
          settings[Setting::stabilisation_low],
          settings[Setting::stabilisation_high],
          settings[Setting::log_ratio_limit],
          settings[Setting::sequence_log_ratio_low],
          settings[Setting::sequence_log_ratio_high],
          settings[Setting::kl_coef],
          settings[Setting::kl_log_ratio_limit],
          settings[Setting::kl_limit],
          settings[Setting::anchor_coef],
          settings[Setting::rollout_low],
          settings[Setting::rollout_high],
          settings[Setting::entropy_coef]};
}

LossParams loss_params(const LossTensors& tensors, const LossShape& shape, const std::vector<int64_t>& choices,
                       const std::vector<double>& settings) {
  LossParams params{};
  params.logprobs = cuda::input(tensors.logprobs);
  params.old_logprobs = cuda::input(tensors.old_logprobs);
  if (choices[Choice::kl] != 0) params.ref_logprobs = cuda::input(tensors.ref_logprobs);
  if (choices[Choice::anchor] != 0) params.anchor_logprobs = cuda::input(tensors.anchor_logprobs);
  params.rollout_logprobs = cuda::input(tensors.rollout_logprobs);
  params.entropy = cuda::input(tensors.entropy);
  params.clip_low = cuda::input(tensors.clip_low);
  params.clip_high = cuda::input(tensors.clip_high);
  params.token_weights = cuda::input(tensors.token_weights);
  params.advantages = {cuda::input(tensors.advantages), shape.advantages_per_token};
  params.rollout_weights = {cuda::input(tensors.rollout_weights), shape.rollout_weights_per_token};
  params.second_advantages = {cuda::input(tensors.second_advantages), shape.second_advantages_per_token};
  params.advantage_weights = {cuda::input(tensors.advantage_weights), shape.advantage_weights_per_token};
  params.mask = cuda::input<uint8_t>(tensors.mask);
  params.keep = cuda::input<uint8_t>(tensors.keep);
  params.anchor_keep = cuda::input<uint8_t>(tensors.anchor_keep);
  params.cu_seqlens = cuda::input<int64_t>(tensors.cu_seqlens);
  params.tokens = tensors.logprobs.numel();
  params.sequences = shape.sequences;
  params.columns = tensors.cu_seqlens ? 0 : tensors.logprobs.size(1);
  params.ratio = static_cast<LossRatio>(choices[Choice::ratio]);
  params.rule = static_cast<LossRule>(choices[Choice::rule]);
  params.weight_negative_only = choices[Choice::weight_negative_only] != 0;
  params.stabilisation = static_cast<LossStabilisation>(choices[Choice::stabilisation]);
  params.kl = static_cast<KlDivergence>(choices[Choice::kl]);
  params.kl_gradient = static_cast<KlGradient>(choices[Choice::kl_gradient]);
  params.anchor = static_cast<KlDivergence>(choices[Choice::anchor]);
  params.rollout_rule = static_cast<RolloutRule>(choices[Choice::rollout_rule]);
  params.aggregate = static_cast<LossAggregate>(choices[Choice::aggregate]);
  params.count_empty = choices[Choice::count_empty] != 0;
  params.denominator = settings[Setting::denominator];
  params.horizon = settings[Setting::horizon];
  params.bounds = loss_bounds(settings);
  return params;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor logprobs, Tensor old_logprobs, Tensor advantages, MaybeTensor mask, MaybeTensor cu_seqlens,
    MaybeTensor keep, MaybeTensor ref_logprobs, MaybeTensor anchor_logprobs, MaybeTensor anchor_keep,
    MaybeTensor rollout_logprobs, MaybeTensor rollout_weights, MaybeTensor entropy, MaybeTensor clip_low,
    MaybeTensor clip_high, MaybeTensor second_advantages, MaybeTensor advantage_weights, MaybeTensor token_weights,
    std::vector<int64_t> choices, std::vector<double> settings, bool with_gradient) {
  const ScalarType type = logprobs.scalar_type();
  const LossTensors tensors{logprobs,     old_logprobs,    advantages,        mask,
                            cu_seqlens,   keep,            ref_logprobs,      anchor_logprobs,
                            anchor_keep,  rollout_logprobs, rollout_weights,   entropy,
                            clip_low,     clip_high,       second_advantages, advantage_weights,
                            token_weights};
  const LossShape shape = check_loss(tensors, choices, settings, cuda::check_device);

  const cuda::DeviceGuard guard(logprobs);
  const auto coefficient_of = [&](bool wanted) {
    return wanted ? cuda::empty(logprobs, logprobs.sizes(), type) : cuda::empty(logprobs, {0}, type);
  };
  Tensor coefficient = coefficient_of(with_gradient);
  Tensor entropy_coefficient = coefficient_of(with_gradient && entropy);
  if (logprobs.numel() == 0 || shape.sequences == 0) {
    return {cuda::new_zeros(logprobs, {}), cuda::new_zeros(logprobs, coefficient.sizes()),
            cuda::new_zeros(logprobs, entropy_coefficient.sizes()), cuda::new_zeros(logprobs, {kLossMetrics})};
  }
  Tensor loss = cuda::empty(logprobs, {}, type);
  Tensor metrics = cuda::empty(logprobs, {kLossMetrics}, type);
  LossParams params = loss_params(tensors, shape, choices, settings);
  params.loss = cuda::output(loss);
  params.metrics = cuda::output(metrics);
  if (with_gradient) params.coefficient = cuda::output(coefficient);
  if (with_gradient && entropy) params.entropy_coefficient = cuda::output(entropy_coefficient);
  const DataType data = data_type(logprobs, "logprobs");
  const LossWorkspace space = add_workspace(params, data, logprobs);
  cuda::check_launch(launch_policy_loss(data, params, cuda::current_stream(logprobs)), "policy_loss");
  return {loss, coefficient, entropy_coefficient, metrics};
}

Tensor token_weights(Tensor logprobs, MaybeTensor mask, MaybeTensor cu_seqlens, int64_t aggregate, bool count_empty,
                     double denominator, double horizon) {
  check_floating(logprobs);
  STD_TORCH_CHECK(aggregate >= 0 && aggregate <= 4, "aggregate: unknown");
  check_tokens(logprobs, logprobs, logprobs.scalar_type(), "logprobs", cuda::check_device);
  check_tokens(mask, logprobs, ScalarType::Bool, "mask", cuda::check_device);
  const int64_t sequences = check_sequences(logprobs, cu_seqlens, cuda::check_device);

  const cuda::DeviceGuard guard(logprobs);
  Tensor weights = cuda::empty(logprobs, logprobs.sizes(), logprobs.scalar_type());
  if (logprobs.numel() == 0 || sequences == 0) return weights;
  LossParams params{};
  params.mask = cuda::input<uint8_t>(mask);
  params.cu_seqlens = cuda::input<int64_t>(cu_seqlens);
  params.coefficient = cuda::output(weights);
  params.tokens = logprobs.numel();
  params.sequences = sequences;
  params.columns = cu_seqlens ? 0 : logprobs.size(1);
  params.aggregate = static_cast<LossAggregate>(aggregate);
  params.count_empty = count_empty;
  params.denominator = denominator;
  params.horizon = horizon;
  const DataType data = data_type(logprobs, "logprobs");
  const LossWorkspace space = add_workspace(params, data, logprobs);
  cuda::check_launch(launch_policy_loss_token_weights(data, params, cuda::current_stream(logprobs)),
                     "policy_loss_token_weights");
  return weights;
}

Tensor backward(Tensor grad_loss, Tensor coefficient) {
  const ScalarType type = coefficient.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "coefficient: expected float32 or float64");
  cuda::check_device(coefficient, "coefficient");
  cuda::check_device(grad_loss, "grad_loss");
  check_type(grad_loss, type, "grad_loss");
  STD_TORCH_CHECK(grad_loss.numel() == 1, "grad_loss: expected one element");
  check_contiguous(coefficient, "coefficient");
  const cuda::DeviceGuard guard(coefficient);
  Tensor gradient = cuda::empty(coefficient, coefficient.sizes(), type);
  if (coefficient.numel() == 0) return gradient;
  const LossGradientParams params{cuda::input(grad_loss), cuda::input(coefficient), cuda::output(gradient),
                                  coefficient.numel()};
  cuda::check_launch(launch_policy_loss_gradient(data_type(coefficient, "coefficient"), params,
                                                 cuda::current_stream(coefficient)),
                     "policy_loss_backward");
  return gradient;
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("policy_loss_forward", TORCH_BOX(&forward));
  m.impl("policy_loss_backward", TORCH_BOX(&backward));
  m.impl("policy_loss_token_weights", TORCH_BOX(&token_weights));
}

}  // namespace pykern
