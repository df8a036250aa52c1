// Host side of masked_quantile, masked_select_share and masked_moments on a GPU.
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda.h"
#include "kernels/policy/selection.h"
#include "policy/selection_arguments.h"

namespace pykern {
namespace {

std::tuple<Tensor, Tensor> masked_select_share(Tensor values, std::optional<Tensor> mask,
                                               std::optional<Tensor> candidates, int64_t order, double share,
                                               int64_t minimum, int64_t seed) {
  check_share(values, mask, candidates, order, share, minimum, cuda::check_device);
  const cuda::DeviceGuard guard(values);
  const int64_t tokens = values.numel();
  Tensor selected = cuda::empty(values, values.sizes(), ScalarType::Bool);
  if (tokens == 0) return {selected, cuda::new_zeros(values, {2}, ScalarType::Long)};
  Tensor counts = cuda::empty(values, {2}, ScalarType::Long);
  Tensor state = cuda::new_zeros(values, {kSelectionStateWords}, ScalarType::Long);
  Tensor ties = cuda::empty(values, {selection_blocks(tokens)}, ScalarType::Long);
  SelectionParams params{};
  params.values = cuda::input(values);
  params.mask = cuda::input<uint8_t>(mask);
  params.candidates = cuda::input<uint8_t>(candidates);
  params.tokens = tokens;
  params.state = cuda::workspace<SelectionState>(state);
  params.order = static_cast<SelectionOrder>(order);
  params.share = share;
  params.minimum = minimum;
  params.seed = static_cast<uint64_t>(seed);
  params.selected = cuda::output<uint8_t>(selected);
  params.counts = cuda::output<int64_t>(counts);
  params.ties = cuda::workspace<unsigned long long>(ties);
  cuda::check_launch(launch_select_share(data_type(values, "values"), params, cuda::current_stream(values)),
                     "masked_select_share");
  return {selected, counts};
}

Tensor masked_quantile(Tensor values, std::optional<Tensor> mask, std::vector<double> quantiles,
                       int64_t interpolation) {
  check_quantiles(values, mask, quantiles, interpolation, cuda::check_device);
  const auto count = static_cast<int64_t>(quantiles.size());
  const cuda::DeviceGuard guard(values);
  Tensor result = cuda::empty(values, {count}, values.scalar_type());
  if (values.numel() == 0) return torch::stable::fill_(result, std::numeric_limits<double>::quiet_NaN());
  if (count == 0) return result;
  Tensor states = cuda::new_zeros(values, {count * kSelectionStateWords}, ScalarType::Long);
  SelectionParams params{};
  params.values = cuda::input(values);
  params.mask = cuda::input<uint8_t>(mask);
  params.tokens = values.numel();
  params.order = SelectionOrder::smallest;
  params.interpolation = static_cast<Interpolation>(interpolation);
  auto* state = cuda::workspace<SelectionState>(states);
  auto* target = cuda::output<unsigned char>(result);
  for (int64_t index = 0; index < count; ++index) {
    params.state = state + index;
    params.quantile = quantiles[index];
    params.result = target + index * result.element_size();
    cuda::check_launch(launch_quantile(data_type(values, "values"), params, cuda::current_stream(values)),
                       "masked_quantile");
  }
  return result;
}

Tensor masked_moments(Tensor values, std::optional<Tensor> mask, std::optional<Tensor> centre) {
  check_moments(values, mask, centre, cuda::check_device);
  const cuda::DeviceGuard guard(values);
  const int64_t blocks = moments_blocks(values.numel());
  Tensor moments = cuda::empty(values, {kMoments}, ScalarType::Double);
  Tensor partial = cuda::empty(values, {blocks * kMoments}, ScalarType::Double);
  Tensor finished = cuda::new_zeros(values, {1}, ScalarType::Long);
  const MomentsParams params{cuda::input(values),
                             cuda::input<uint8_t>(mask),
                             cuda::input<double>(centre),
                             values.numel(),
                             cuda::workspace<double>(partial),
                             cuda::workspace<unsigned long long>(finished),
                             cuda::output<double>(moments)};
  cuda::check_launch(launch_moments(data_type(values, "values"), params, cuda::current_stream(values)),
                     "masked_moments");
  return moments;
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("masked_quantile", TORCH_BOX(&masked_quantile));
  m.impl("masked_select_share", TORCH_BOX(&masked_select_share));
  m.impl("masked_moments", TORCH_BOX(&masked_moments));
}

}  // namespace pykern
