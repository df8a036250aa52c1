// Host side of masked_whiten on a GPU.
#include <optional>

#include "common/cuda.h"
#include "kernels/policy/whiten.h"
#include "policy/returns_arguments.h"

namespace pykern {
namespace {

Tensor masked_whiten(Tensor values, std::optional<Tensor> mask, bool shift_mean, double eps, int64_t ddof) {
  check_whiten(values, mask, eps, ddof, cuda::check_device);
  const cuda::DeviceGuard guard(values);
  Tensor result = cuda::empty(values, values.sizes(), values.scalar_type());
  if (values.numel() == 0) return result;
  WhitenParams params{cuda::input(values),
                      cuda::input<uint8_t>(mask),
                      cuda::output(result),
                      values.numel(),
                      shift_mean,
                      eps,
                      static_cast<int>(ddof),
                      0,
                      nullptr,
                      nullptr,
                      nullptr};
  params.blocks = whiten_blocks(params);
  Tensor moments = cuda::empty(values, {params.blocks * kWhitenNumbers}, ScalarType::Double);
  Tensor whitening = cuda::empty(values, {kWhiteningNumbers}, ScalarType::Double);
  Tensor finished = cuda::new_zeros(values, {1}, ScalarType::Long);
  params.moments = cuda::workspace<double>(moments);
  params.whitening = cuda::workspace<double>(whitening);
  params.finished = cuda::workspace<unsigned long long>(finished);
  cuda::check_launch(launch_masked_whiten(data_type(values, "values"), params, cuda::current_stream(values)),
                     "masked_whiten");
  return result;
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("masked_whiten", TORCH_BOX(&masked_whiten)); }

}  // namespace pykern
