// Host side of policy_loss on a GPU. The bounds of packed sequences stay on the device, unchecked.
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda.h"
#include "kernels/policy/loss.h"
#include "policy/arguments.h"

namespace pykern {
namespace {

int64_t count_sequences(const Tensor& logprobs, const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens) {
    check_dim(logprobs, 2, "logprobs");
    return logprobs.size(0);
  }
  check_dim(logprobs, 1, "logprobs");
  cuda::check_device(*cu_seqlens, "cu_seqlens");
  check_dim(*cu_seqlens, 1, "cu_seqlens");
  check_type(*cu_seqlens, ScalarType::Long, "cu_seqlens");
  check_contiguous(*cu_seqlens, "cu_seqlens");
  STD_TORCH_CHECK(cu_seqlens->numel() > 0, "cu_seqlens: expected at least one entry");
  return cu_seqlens->numel() - 1;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                                           std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                           std::optional<Tensor> ref_logprobs, std::optional<Tensor> rollout_logprobs,
                                           bool sequence_ratio, bool weight_clip, int64_t kl, int64_t aggregate,
                                           std::vector<double> settings, bool with_gradient) {
  const ScalarType type = logprobs.scalar_type();
  check_loss(logprobs, old_logprobs, mask, ref_logprobs, rollout_logprobs, kl, aggregate, settings, cuda::check_device);
  const int64_t tokens = logprobs.numel(), sequences = count_sequences(logprobs, cu_seqlens);
  const bool per_token = check_loss_advantages(advantages, logprobs, sequences, cuda::check_device);

  const cuda::DeviceGuard guard(logprobs);
  if (tokens == 0 || sequences == 0) {
    return {cuda::new_zeros(logprobs, {}),
            with_gradient ? torch::stable::empty_like(logprobs) : cuda::empty(logprobs, {0}, type),
            cuda::new_zeros(logprobs, {kLossMetrics})};
  }
  Tensor loss = cuda::empty(logprobs, {}, type);
  Tensor metrics = cuda::empty(logprobs, {kLossMetrics}, type);
  Tensor coefficient = with_gradient ? cuda::empty(logprobs, logprobs.sizes(), type) : cuda::empty(logprobs, {0}, type);
  LossParams params{cuda::input(logprobs),
                    cuda::input(old_logprobs),
                    cuda::input(advantages),
                    cuda::input(ref_logprobs),
                    cuda::input(rollout_logprobs),
                    cuda::input<uint8_t>(mask),
                    cuda::input<int64_t>(cu_seqlens),
                    cuda::output(loss),
                    with_gradient ? cuda::output(coefficient) : nullptr,
                    cuda::output(metrics),
                    tokens,
                    sequences,
                    cu_seqlens ? 0 : logprobs.size(1),
                    per_token,
                    sequence_ratio,
                    weight_clip,
                    static_cast<KlDivergence>(kl),
                    static_cast<LossAggregate>(aggregate),
                    settings[kDenominator],
                    settings[kHorizon],
                    {settings[kRatioLow], settings[kRatioHigh], settings[kDualClip], settings[kLogRatioLimit],
                     settings[kSequenceLogRatioLimit], settings[kKlCoef], settings[kKlLogRatioLimit],
                     settings[kKlLimit], settings[kRolloutClip]},
                    {},
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr};
  const DataType data = data_type(logprobs, "logprobs");
  params.grid = loss_grid(data, params);
  const int64_t parts = sequence_ratio ? sequences * params.grid.parts : 0;
  Tensor counters = cuda::new_zeros(logprobs, {kSequenceLengths + sequences}, ScalarType::Long);
  Tensor mask_bits = cuda::empty(logprobs, {mask ? loss_mask_words(tokens, sequences) : 0}, ScalarType::Int);
  Tensor part_sums = cuda::empty(logprobs, {parts * kPartSums}, ScalarType::Double);
  Tensor block_sums = cuda::empty(logprobs, {params.grid.blocks * kBlockSums}, ScalarType::Double);
  params.counters = cuda::workspace<unsigned long long>(counters);
  params.mask_bits = cuda::workspace<uint32_t>(mask_bits);
  params.part_sums = cuda::workspace<double>(part_sums);
  params.block_sums = cuda::workspace<double>(block_sums);
  cuda::check_launch(launch_policy_loss(data, params, cuda::current_stream(logprobs)), "policy_loss");
  return {loss, coefficient, metrics};
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
}

}  // namespace pykern
