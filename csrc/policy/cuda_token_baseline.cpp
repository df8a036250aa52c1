// Host side of optimal_token_baseline on a GPU.
#include <optional>
#include <tuple>

#include "common/cuda.h"
#include "kernels/policy/token_baseline.h"
#include "policy/token_baseline_arguments.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor> optimal_token_baseline(Tensor returns, Tensor logprobs, Tensor sum_p2, Tensor group_ids,
                                                  std::optional<Tensor> mask, std::optional<Tensor> weights,
                                                  bool by_token, bool zero_tail, double eps, bool singleton_self) {
  check_token_baseline(returns, logprobs, sum_p2, group_ids, mask, weights, cuda::check_device);
  const int64_t rows = returns.size(0), columns = returns.size(1), tiles = baseline_tiles(columns);
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  STD_TORCH_CHECK(columns <= kMost && rows * (tiles > 0 ? tiles : 1) <= kMost, "returns: expected fewer tokens, got ",
                  rows, " x ", columns);

  const cuda::DeviceGuard guard(returns);
  Tensor counts = cuda::new_zeros(group_ids, {1});
  Tensor advantages = by_token ? cuda::new_zeros(returns, returns.sizes())
                               : cuda::empty(returns, returns.sizes(), returns.scalar_type());
  if (returns.numel() == 0) return {advantages, counts};
  constexpr int64_t kRowWords = sizeof(BaselineRow) / sizeof(int64_t);
  Tensor of_rows = cuda::empty(returns, {rows * kRowWords}, ScalarType::Long);
  Tensor has_previous = cuda::new_zeros(returns, {rows}, ScalarType::Byte);
  Tensor columns_of = cuda::empty(returns, {by_token ? rows * columns : 0}, ScalarType::Int);
  Tensor energy_before = cuda::empty(returns, {rows * tiles}, ScalarType::Double);
  const TokenBaselineParams params{cuda::input(returns),
                                   cuda::input(logprobs),
                                   cuda::input(sum_p2),
                                   cuda::input(weights),
                                   cuda::input<int64_t>(group_ids),
                                   cuda::input<uint8_t>(mask),
                                   cuda::output(advantages),
                                   cuda::output<unsigned long long>(counts),
                                   rows,
                                   columns,
                                   tiles,
                                   by_token,
                                   zero_tail,
                                   singleton_self,
                                   eps,
                                   cuda::workspace<BaselineRow>(of_rows),
                                   cuda::workspace<uint8_t>(has_previous),
                                   cuda::workspace<int32_t>(columns_of),
                                   cuda::workspace<double>(energy_before)};
  cuda::check_launch(
      launch_token_baseline(data_type(returns, "returns"), params, cuda::current_stream(returns)),
      "optimal_token_baseline");
  return {advantages, counts};
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("optimal_token_baseline", TORCH_BOX(&optimal_token_baseline)); }

}  // namespace pykern
