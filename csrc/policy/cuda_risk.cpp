// Host side of risk_advantages on a GPU.
#include <optional>
#include <tuple>

#include "common/cuda.h"
#include "kernels/policy/risk.h"
#include "policy/risk_arguments.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor, Tensor> risk_advantages(Tensor rewards, Tensor group_ids, Tensor bundle_ids,
                                                   std::optional<Tensor> tracked, double low_level, double high_level,
                                                   double mix, double upper_tail, bool tracked_alone, int64_t credit,
                                                   double eps) {
  check_risk(rewards, group_ids, bundle_ids, tracked, credit, cuda::check_device);
  const int64_t rows = rewards.size(0);
  STD_TORCH_CHECK(rows <= kMaxRiskRows, "rewards: expected at most ", kMaxRiskRows, " rows, got ", rows);

  const cuda::DeviceGuard guard(rewards);
  Tensor advantages = cuda::empty(rewards, {rows}, rewards.scalar_type());
  Tensor papers = cuda::empty(rewards, {rows}, rewards.scalar_type());
  // The counts, and behind them the number of rows in lists: zeroed together.
  Tensor zeros = cuda::new_zeros(group_ids, {kRiskCounts + 1});
  Tensor counts = torch::stable::narrow(zeros, 0, 0, kRiskCounts);
  if (rows == 0) return {advantages, papers, counts};
  Tensor lists = cuda::empty(rewards, {rows * static_cast<int64_t>(sizeof(RiskRow))}, ScalarType::Byte);
  Tensor paper_lists = cuda::empty(rewards, {rows * static_cast<int64_t>(sizeof(RiskPaper))}, ScalarType::Byte);
  auto* zero_data = cuda::output<unsigned long long>(zeros);
  const RiskParams params{
      cuda::input(rewards),
      cuda::input<int64_t>(group_ids),
      cuda::input<int64_t>(bundle_ids),
      cuda::input<double>(tracked),
      cuda::output(advantages),
      cuda::output(papers),
      zero_data,
      zero_data + kRiskCounts,
      cuda::workspace<RiskRow>(lists),
      cuda::workspace<RiskPaper>(paper_lists),
      rows,
      {low_level, high_level, mix, upper_tail, tracked_alone, static_cast<RiskCredit>(credit), eps}};
  cuda::check_launch(launch_risk_advantages(data_type(rewards, "rewards"), params, cuda::current_stream(rewards)),
                     "risk_advantages");
  return {advantages, papers, counts};
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("risk_advantages", TORCH_BOX(&risk_advantages)); }

}  // namespace pykern
