// Host side of disco_loss on a GPU. The bounds of packed sequences stay on the device, unchecked.
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda.h"
#include "policy/disco_arguments.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(Tensor logprobs, Tensor old_logprobs, Tensor rewards, Tensor group_ids,
                                           std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, int64_t score,
                                           int64_t negatives, int64_t positives, int64_t divergence, bool published,
                                           std::vector<double> settings, bool with_gradient) {
  const int64_t sequences = check_batch(logprobs, mask, cu_seqlens, "logprobs", cuda::check_device);
  const ScalarType type = logprobs.scalar_type();
  check_like(old_logprobs, logprobs, "old_logprobs", cuda::check_device);
  check_of_sequences(rewards, sequences, type, "rewards", cuda::check_device);
  check_of_sequences(group_ids, sequences, ScalarType::Long, "group_ids", cuda::check_device);
  const DiscoRules rules = disco_rules(score, negatives, positives, divergence, published, settings);

  const cuda::DeviceGuard guard(logprobs);
  Tensor coefficient = with_gradient ? cuda::empty(logprobs, logprobs.sizes(), type) : cuda::empty(logprobs, {0}, type);
  if (sequences == 0) return {cuda::new_zeros(logprobs, {}), coefficient, cuda::new_zeros(logprobs, {kDiscoMetrics})};
  Tensor loss = cuda::empty(logprobs, {}, type);
  Tensor metrics = cuda::empty(logprobs, {kDiscoMetrics}, type);
  Tensor sums = cuda::empty(logprobs, {sequences * kDiscoSums}, ScalarType::Double);
  Tensor shares = cuda::empty(logprobs, {sequences}, ScalarType::Double);
  Tensor totals = cuda::empty(logprobs, {sequences * kDiscoTotals}, ScalarType::Double);
  Tensor factors = cuda::empty(logprobs, {2}, ScalarType::Double);
  Tensor finished = cuda::new_zeros(logprobs, {1}, ScalarType::Long);
  const DiscoParams params{cuda::input(logprobs),
                           cuda::input(old_logprobs),
                           cuda::input(rewards),
                           cuda::input<int64_t>(group_ids),
                           {cuda::input<uint8_t>(mask), cuda::input<int64_t>(cu_seqlens), logprobs.numel(), sequences,
                            cu_seqlens ? 0 : logprobs.size(1)},
                           rules,
                           cuda::output(loss),
                           cuda::output(metrics),
                           with_gradient ? cuda::output(coefficient) : nullptr,
                           cuda::workspace<double>(sums),
                           cuda::workspace<double>(shares),
                           cuda::workspace<double>(totals),
                           cuda::workspace<double>(factors),
                           cuda::workspace<unsigned long long>(finished)};
  cuda::check_launch(launch_disco_loss(data_type(logprobs, "logprobs"), params, cuda::current_stream(logprobs)),
                     "disco_loss");
  return {loss, coefficient, metrics};
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("disco_loss_forward", TORCH_BOX(&forward)); }

}  // namespace pykern
