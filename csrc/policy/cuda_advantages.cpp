// Host side of group_advantages and group_entropy on a GPU.
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda.h"
#include "kernels/policy/advantages.h"
#include "policy/advantages_arguments.h"

namespace pykern {
namespace {

void check_rows(int64_t rows, const char* name) {
  STD_TORCH_CHECK(rows <= kMaxAdvantageRows, name, ": expected at most ", kMaxAdvantageRows, " rows, got ", rows);
}

// A table in global memory, for blocks whose groups have more rows than shared memory holds.
Tensor empty_tables(const Tensor& like, int64_t rows, int64_t row_bytes) {
  return cuda::empty(like, {rows > kSharedGroupRows ? rows * row_bytes : 0}, ScalarType::Byte);
}

// Which of its columns the last block needs.
std::vector<double* BatchColumns::*> needed_columns(const AdvantageParams& params) {
  if (!params.whole_batch) return {};
  const Scale scale = params.scale;
  const bool of_batch = params.baseline == Baseline::batch_mean || params.baseline == Baseline::groups_mean;
  const bool falls_back = of_batch && scale == Scale::token_std && params.fallback < HUGE_VAL;
  std::vector<double* BatchColumns::*> needed;
  const auto add = [&](bool is_needed, double* BatchColumns::*column) {
    if (is_needed) needed.push_back(column);
  };
  add(params.baseline == Baseline::batch_mean || scale == Scale::batch_std || scale == Scale::nonzero_share ||
          falls_back,
      &BatchColumns::value);
  add(!of_batch, &BatchColumns::centred);
  add(scale == Scale::group_std || scale == Scale::leave_one_out_std || scale == Scale::token_std ||
          scale == Scale::group_mean,
      &BatchColumns::divisor);
  add(params.baseline == Baseline::groups_mean || scale == Scale::groups_std || scale == Scale::beta || falls_back,
      &BatchColumns::mean);
  add(falls_back, &BatchColumns::low);
  add(falls_back, &BatchColumns::high);
  add(falls_back, &BatchColumns::deviation);
  return needed;
}

std::tuple<Tensor, Tensor, Tensor> group_advantages(Tensor rewards, std::vector<double> component_weights,
                                                    Tensor group_ids, std::optional<Tensor> lengths,
                                                    std::optional<Tensor> baseline_rewards, bool decompose,
                                                    int64_t transform, int64_t baseline, int64_t scale, int64_t finish,
                                                    int64_t filter, int64_t ddof, bool singleton_self,
                                                    std::vector<double> settings) {
  const AdvantageRequest request =
      check_advantages(rewards, component_weights, group_ids, lengths, baseline_rewards, decompose, transform, baseline,
                       scale, finish, filter, ddof, singleton_self, settings, cuda::check_device);
  const int64_t rows = rewards.size(0), components = rewards.size(1);
  constexpr int64_t kCounts = static_cast<int64_t>(AdvantageCount::count);
  check_rows(rows, "rewards");

  const cuda::DeviceGuard guard(rewards);
  Tensor advantages = cuda::empty(rewards, {rows}, rewards.scalar_type());
  Tensor keep = cuda::empty(rewards, {rows}, ScalarType::Bool);
  // The counts, and behind them the number of finished blocks: zeroed together.
  Tensor zeros = cuda::new_zeros(group_ids, {kCounts + 1});
  Tensor counts = torch::stable::narrow(zeros, 0, 0, kCounts);
  if (rows == 0) return {advantages, keep, counts};

  AdvantageParams params{};
  params.rewards = cuda::input(rewards);
  params.ids = cuda::input<int64_t>(group_ids);
  params.lengths = cuda::input<int64_t>(lengths);
  params.baseline_rewards = cuda::input(baseline_rewards);
  params.advantages = cuda::output(advantages);
  params.keep = cuda::output<bool>(keep);
  params.counts = cuda::output<unsigned long long>(zeros);
  params.finished = params.counts + kCounts;
  params.rows = rows;
  params.components = static_cast<int>(components);
  params.decompose = request.decompose;
  params.transform = request.transform;
  params.baseline = request.baseline;
  params.scale = request.scale;
  params.finish = request.finish;
  params.filter = request.filter;
  params.stage = AdvantageStage::whole;
  params.group_transform = transforms_by_group(request.transform);
  params.grouped = is_grouped(request.transform, request.baseline, request.scale);
  params.by_length = weighs_by_length(request.baseline, request.scale);
  params.whole_batch = needs_whole_batch(params);
  params.ddof = request.ddof;
  params.singleton_self = request.singleton_self;
  for (int64_t component = 0; component < components; ++component) {
    params.weights[component] = component_weights[static_cast<size_t>(component)];
  }
  params.eps = request.setting(AdvantageSetting::eps);
  params.finish_eps = request.setting(AdvantageSetting::finish_eps);
  params.k = request.setting(AdvantageSetting::k);
  params.overlong_longest = request.setting(AdvantageSetting::overlong_longest);
  params.overlong_buffer = request.setting(AdvantageSetting::overlong_buffer);
  params.overlong_factor = request.setting(AdvantageSetting::overlong_factor);
  params.relative_length = request.setting(AdvantageSetting::relative_length);
  params.fallback = request.setting(AdvantageSetting::fallback);
  params.window_low = request.setting(AdvantageSetting::window_low);
  params.window_high = request.setting(AdvantageSetting::window_high);

  Tensor tables = empty_tables(rewards, rows, is_plain(params) ? kPlainRowBytes : kAdvantageRowBytes);
  params.tables = cuda::workspace<unsigned char>(tables);
  const std::vector<double* BatchColumns::*> needed = needed_columns(params);
  const int64_t values = params.whole_batch ? rows * (decompose ? components : 1) : 0;
  // The columns, and behind them the sums of all components' advantages.
  const int64_t column_values = values * static_cast<int64_t>(needed.size());
  Tensor columns = cuda::empty(rewards, {params.whole_batch ? column_values + rows : 0}, ScalarType::Double);
  Tensor states = cuda::empty(rewards, {values}, ScalarType::Byte);
  double* next = cuda::workspace<double>(columns);
  for (double* BatchColumns::*column : needed) {
    params.columns.*column = next;
    next += values;
  }
  params.columns.states = cuda::workspace<uint8_t>(states);
  params.combined = next;
  cuda::check_launch(launch_group_advantages(data_type(rewards, "rewards"), params, cuda::current_stream(rewards)),
                     "group_advantages");
  return {advantages, keep, counts};
}

std::tuple<Tensor, Tensor> group_entropy(Tensor group_ids, Tensor answer_ids) {
  check_entropy(group_ids, answer_ids, cuda::check_device);
  const int64_t rows = group_ids.size(0);
  check_rows(rows, "group_ids");
  const cuda::DeviceGuard guard(group_ids);
  Tensor entropy = cuda::empty(group_ids, {rows}, ScalarType::Double);
  Tensor sizes = cuda::empty(group_ids, {rows}, ScalarType::Long);
  if (rows == 0) return {entropy, sizes};
  Tensor tables = empty_tables(group_ids, rows, kEntropyRowBytes);
  const EntropyParams params{cuda::input<int64_t>(group_ids),
                             cuda::input<int64_t>(answer_ids),
                             cuda::output<double>(entropy),
                             cuda::output<int64_t>(sizes),
                             cuda::workspace<unsigned char>(tables),
                             rows};
  cuda::check_launch(launch_group_entropy(params, cuda::current_stream(group_ids)), "group_entropy");
  return {entropy, sizes};
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("group_advantages", TORCH_BOX(&group_advantages));
  m.impl("group_entropy", TORCH_BOX(&group_entropy));
}

}  // namespace pykern
