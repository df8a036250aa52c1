// Host side of rollout_correction on a GPU. The bounds of packed sequences stay on the device, unchecked.
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda.h"
#include "kernels/policy/rollout.h"
#include "policy/rollout_arguments.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor, Tensor> rollout_correction(Tensor old_logprobs, Tensor rollout_logprobs,
                                                      std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                                                      int64_t weight, bool weight_mask, int64_t criteria,
                                                      bool unscored_are_one, bool normalize,
                                                      std::vector<double> settings) {
  const int64_t sequences = check_batch(old_logprobs, mask, cu_seqlens, "old_logprobs", cuda::check_device);
  check_like(rollout_logprobs, old_logprobs, "rollout_logprobs", cuda::check_device);
  const RolloutRules rules = rollout_rules(weight, weight_mask, criteria, unscored_are_one, normalize, settings);
  const ScalarType type = old_logprobs.scalar_type();

  const cuda::DeviceGuard guard(old_logprobs);
  const bool none = rules.weight == RolloutWeight::none;
  Tensor keep = cuda::empty(old_logprobs, old_logprobs.sizes(), ScalarType::Bool);
  Tensor weights = rules.weight == RolloutWeight::token ? cuda::empty(old_logprobs, old_logprobs.sizes(), type)
                                                        : cuda::empty(old_logprobs, {none ? 0 : sequences}, type);
  Tensor metrics = cuda::empty(old_logprobs, {kRolloutMetrics}, type);
  Tensor columns = cuda::empty(old_logprobs, {sequences * kPaddedColumns}, ScalarType::Double);
  Tensor divisor = cuda::empty(old_logprobs, {1}, ScalarType::Double);
  Tensor finished = cuda::new_zeros(old_logprobs, {1}, ScalarType::Long);
  const RolloutParams params{cuda::input(old_logprobs),
                             cuda::input(rollout_logprobs),
                             {cuda::input<uint8_t>(mask), cuda::input<int64_t>(cu_seqlens), old_logprobs.numel(),
                              sequences, cu_seqlens ? 0 : old_logprobs.size(1)},
                             rules,
                             none ? nullptr : cuda::output(weights),
                             cuda::output<uint8_t>(keep),
                             cuda::output(metrics),
                             cuda::workspace<double>(columns),
                             cuda::workspace<double>(divisor),
                             cuda::workspace<unsigned long long>(finished)};
  cuda::check_launch(launch_rollout_correction(data_type(old_logprobs, "old_logprobs"), params,
                                               cuda::current_stream(old_logprobs)),
                     "rollout_correction");
  return {weights, keep, metrics};
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("rollout_correction", TORCH_BOX(&rollout_correction)); }

}  // namespace pykern
