// Host side of group_advantages on a GPU.
#include <optional>
#include <tuple>

#include "common/cuda.h"
#include "kernels/policy/advantages.h"
#include "policy/arguments.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor> group_advantages(Tensor rewards, Tensor group_ids, std::optional<Tensor> lengths,
                                            std::optional<Tensor> baseline_rewards, int64_t baseline, int64_t scale,
                                            double eps, int64_t ddof, bool singleton_self) {
  check_advantages(rewards, group_ids, lengths, baseline_rewards, baseline, scale, cuda::check_device);
  const int64_t rows = rewards.size(0);
  const ScalarType type = rewards.scalar_type();
  STD_TORCH_CHECK(rows <= kMaxAdvantageRows, "rewards: expected at most ", kMaxAdvantageRows, " rows, got ", rows);
  const auto baseline_kind = static_cast<Baseline>(baseline);
  const auto scale_kind = static_cast<Scale>(scale);
  const bool whitens = scale_kind == Scale::token_whiten;

  const cuda::DeviceGuard guard(rewards);
  Tensor advantages = cuda::empty(rewards, {rows}, type);
  // The counts, and behind them the number of finished blocks: zeroed together.
  Tensor zeros = cuda::new_zeros(group_ids, {5});
  Tensor counts = torch::stable::narrow(zeros, 0, 0, 4);
  if (rows == 0) return {advantages, counts};
  const int64_t whitened_rows = whitens ? rows : 0;
  Tensor tables = cuda::empty(rewards, {rows > kSharedGroupRows ? rows * kGroupRowBytes : 0}, ScalarType::Byte);
  Tensor centred = cuda::empty(rewards, {whitened_rows}, ScalarType::Double);
  Tensor states = cuda::empty(rewards, {whitened_rows}, ScalarType::Byte);

  auto* zero_data = cuda::output<unsigned long long>(zeros);
  const AdvantageParams params{cuda::input(rewards),
                               cuda::input<int64_t>(group_ids),
                               cuda::input<int64_t>(lengths),
                               cuda::input(baseline_rewards),
                               cuda::output(advantages),
                               zero_data,
                               zero_data + 4,
                               cuda::workspace<unsigned char>(tables),
                               cuda::workspace<double>(centred),
                               cuda::workspace<uint8_t>(states),
                               rows,
                               baseline_kind,
                               scale_kind,
                               eps,
                               static_cast<int>(ddof),
                               singleton_self};
  cuda::check_launch(launch_group_advantages(data_type(rewards, "rewards"), params, cuda::current_stream(rewards)),
                     "group_advantages");
  return {advantages, counts};
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("group_advantages", TORCH_BOX(&group_advantages)); }

}  // namespace pykern
