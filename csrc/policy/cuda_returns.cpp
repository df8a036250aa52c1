// Host side of discounted_scan on a GPU. The bounds of packed sequences stay on the device, unchecked.
#include <optional>
#include <tuple>

#include "common/cuda.h"
#include "kernels/policy/returns.h"
#include "policy/returns_arguments.h"
#include "policy/sequences.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor> discounted_scan(Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> mask,
                                           std::optional<Tensor> cu_seqlens, std::optional<Tensor> lambdas,
                                           double gamma, double lambda, bool decay) {
  check_scan(rewards, values, mask, cuda::check_device);
  const int64_t sequences = check_sequences(rewards, cu_seqlens, "rewards", cuda::check_device);
  check_lambdas(lambdas, sequences, cuda::check_device);
  const ScalarType type = rewards.scalar_type();

  const cuda::DeviceGuard guard(rewards);
  Tensor advantages =
      values ? cuda::empty(rewards, rewards.sizes(), type) : cuda::empty(rewards, {0}, type);
  Tensor returns = cuda::empty(rewards, rewards.sizes(), type);
  if (rewards.numel() == 0 || sequences == 0) return {advantages, returns};
  DiscountedScanParams params{cuda::input(rewards),
                              cuda::input(values),
                              cuda::input<uint8_t>(mask),
                              cuda::input<int64_t>(cu_seqlens),
                              cuda::input<double>(lambdas),
                              values ? cuda::output(advantages) : nullptr,
                              cuda::output(returns),
                              rewards.numel(),
                              sequences,
                              cu_seqlens ? 0 : rewards.size(1),
                              gamma,
                              lambda,
                              decay,
                              1,
                              nullptr,
                              nullptr};
  params.parts = discounted_scan_parts(params);
  const int64_t chained = params.parts > 1 ? sequences * params.parts : 0;
  Tensor passed = cuda::empty(rewards, {chained}, ScalarType::Double);
  Tensor progress = cuda::new_zeros(rewards, {chained > 0 ? 1 + chained : 0}, ScalarType::Long);
  params.passed = cuda::workspace<double>(passed);
  params.progress = cuda::workspace<unsigned long long>(progress);
  cuda::check_launch(
      launch_discounted_scan(data_type(rewards, "rewards"), params, cuda::current_stream(rewards)), "discounted_scan");
  return {advantages, returns};
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("discounted_scan", TORCH_BOX(&discounted_scan)); }

}  // namespace pykern
