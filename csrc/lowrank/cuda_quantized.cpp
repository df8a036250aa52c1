// Host side of quantised matrices on CUDA.
#include "common/cuda.h"
#include "lowrank/quantized_arguments.h"

namespace pykern {
namespace {

using lowrank::AffineMatrix;
using lowrank::Tensors;

// The values are written if `to_values`, else codes, scale and zero.
std::vector<AffineMatrix> matrices_of(const Tensors& values, const Tensors& codes, const Tensors& scale,
                                      const Tensors& zero, bool to_values) {
  std::vector<AffineMatrix> matrices;
  for (size_t i = 0; i < values.size(); ++i) {
    AffineMatrix matrix{};
    matrix.rows = values[i].size(0);
    matrix.columns = values[i].size(1);
    matrix.row_stride = values[i].stride(0);
    matrix.column_stride = values[i].stride(1);
    if (to_values) {
      matrix.values = cuda::output<void>(values[i]);
      matrix.codes = const_cast<uint8_t*>(cuda::input<uint8_t>(codes[i]));
      matrix.scale = const_cast<float*>(cuda::input<float>(scale[i]));
      matrix.zero = const_cast<float*>(cuda::input<float>(zero[i]));
    } else {
      matrix.values = const_cast<void*>(cuda::input<void>(values[i]));
      matrix.codes = cuda::output<uint8_t>(codes[i]);
      matrix.scale = cuda::output<float>(scale[i]);
      matrix.zero = cuda::output<float>(zero[i]);
    }
    matrices.push_back(matrix);
  }
  return matrices;
}

void run_quantize(const Tensors& values, const Tensors& codes, const Tensors& scale, const Tensors& zero,
                  const std::optional<Tensor>& found_inf, int64_t bits) {
  lowrank::AffineParams params{};
  params.type = lowrank::check_quantized(values, codes, scale, zero, bits, cuda::check_device);
  lowrank::check_optional_one(found_inf, "found_inf", cuda::check_device);
  if (values.empty()) return;
  const cuda::DeviceGuard guard(values[0]);
  params.bits = static_cast<int>(bits);
  params.found_inf = cuda::input<float>(found_inf);
  const std::vector<AffineMatrix> matrices = matrices_of(values, codes, scale, zero, false);
  cuda::check_launch(lowrank::launch_quantize_groups(params, matrices.data(), static_cast<int64_t>(matrices.size()),
                                                     cuda::current_stream(values[0])),
                     "quantize_groups");
}

void run_dequantize(const Tensors& codes, const Tensors& scale, const Tensors& zero, const Tensors& values,
                    const std::optional<Tensor>& grad_scale, int64_t bits, bool adds, bool maximize) {
  lowrank::AffineParams params{};
  params.type = lowrank::check_quantized(values, codes, scale, zero, bits, cuda::check_device);
  lowrank::check_optional_one(grad_scale, "grad_scale", cuda::check_device);
  if (values.empty()) return;
  const cuda::DeviceGuard guard(values[0]);
  params.bits = static_cast<int>(bits);
  params.adds = adds;
  params.sign = maximize ? -1.0f : 1.0f;
  params.grad_scale = cuda::input<float>(grad_scale);
  const std::vector<AffineMatrix> matrices = matrices_of(values, codes, scale, zero, true);
  cuda::check_launch(lowrank::launch_dequantize_groups(params, matrices.data(), static_cast<int64_t>(matrices.size()),
                                                       cuda::current_stream(values[0])),
                     "dequantize_groups");
}

}  // namespace

PYKERN_CUDA_IMPL(m) {
  m.impl("quantize_groups", TORCH_BOX(&run_quantize));
  m.impl("dequantize_groups", TORCH_BOX(&run_dequantize));
}

}  // namespace pykern
