// Host side of quantised matrices on the CPU.
#include <torch/csrc/stable/library.h>

#include "lowrank/quantized.h"
#include "lowrank/quantized_arguments.h"
#include "lowrank/rule.h"

namespace pykern {
namespace {

using lowrank::AffineMatrix;
using lowrank::Tensors;

AffineMatrix matrix_of(const Tensor& values, const Tensor& codes, const Tensor& scale, const Tensor& zero) {
  return {values.mutable_data_ptr(), values.size(0),         values.size(1),       values.stride(0),
          values.stride(1),          output<uint8_t>(codes), output<float>(scale), output<float>(zero)};
}

void run_quantize(const Tensors& values, const Tensors& codes, const Tensors& scale, const Tensors& zero,
                  const std::optional<Tensor>& found_inf, int64_t bits) {
  const DataType type = lowrank::check_quantized(values, codes, scale, zero, bits, check_cpu);
  lowrank::check_optional_one(found_inf, "found_inf", check_cpu);
  if (lowrank::is_skipped(found_inf)) return;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].numel() == 0) continue;
    quantize_matrix()(type, static_cast<int>(bits), matrix_of(values[i], codes[i], scale[i], zero[i]));
  }
}

void run_dequantize(const Tensors& codes, const Tensors& scale, const Tensors& zero, const Tensors& values,
                    const std::optional<Tensor>& grad_scale, int64_t bits, bool adds, bool maximize) {
  const DataType type = lowrank::check_quantized(values, codes, scale, zero, bits, check_cpu);
  lowrank::check_optional_one(grad_scale, "grad_scale", check_cpu);
  const double factor = lowrank::gradient_factor(grad_scale, maximize);
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].numel() == 0) continue;
    dequantize_matrix()(type, static_cast<int>(bits), matrix_of(values[i], codes[i], scale[i], zero[i]),
                        lowrank::Blend{adds, factor});
  }
}

lowrank::Factor factor_of(const Tensor& factor, const char* name) {
  return {data_type(factor, name), factor.const_data_ptr(), factor.stride(0), factor.stride(1)};
}

void run_apply(const Tensors& codes, const Tensors& scale, const Tensors& zero, const Tensors& left,
               const Tensors& right, const Tensors& step, const std::vector<int64_t>& seeds, const Tensor& step_factor,
               const Tensor& lr, const std::optional<Tensor>& found_inf, double factor, double weight_decay,
               bool decay_after) {
  lowrank::check_int8_weights(codes, scale, zero, left, right, step, seeds, step_factor, lr, found_inf, check_cpu);
  if (lowrank::is_skipped(found_inf)) return;
  const double rate = lowrank::number(lr), shrink = rate * weight_decay;
  for (size_t i = 0; i < codes.size(); ++i) {
    if (codes[i].numel() == 0) continue;
    const double step_size = rate * input<double>(step_factor)[i] * factor;
    lowrank::Int8Step request{};
    request.rows = codes[i].size(0);
    request.columns = codes[i].size(1);
    request.rank = left[i].size(1);
    request.codes = output<uint8_t>(codes[i]);
    request.scale = output<float>(scale[i]);
    request.zero = output<float>(zero[i]);
    request.left = factor_of(left[i], "left");
    request.right = factor_of(right[i], "right");
    request.narrow_products = request.left.type == DataType::bf16 || request.right.type == DataType::bf16;
    request.shrink = static_cast<float>(shrink);
    request.step_size = static_cast<float>(decay_after ? step_size * (1 - shrink) : step_size);
    request.seed = static_cast<uint64_t>(seeds[i]);
    request.step = static_cast<uint32_t>(*input<float>(step[i]));
    STD_TORCH_CHECK(int8_weights_step()(request), "low_rank_apply_int8: out of memory");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) {
  m.impl("quantize_groups", TORCH_BOX(&run_quantize));
  m.impl("dequantize_groups", TORCH_BOX(&run_dequantize));
  m.impl("low_rank_apply_int8", TORCH_BOX(&run_apply));
}

}  // namespace pykern
