// Host side of the step of 8-bit weights on CUDA: a product of the vendor's library for every block of rows, and the
// pass over that block's weights. The block of the product is the only temporary.
#include "common/cuda.h"
#include "common/products.h"
#include "kernels/lowrank/int8_weights.h"
#include "lowrank/quantized_arguments.h"

namespace pykern {
namespace {

using lowrank::Tensors;

// Elements of a product, about: enough for the library to be at its best, few enough for the second-level cache.
constexpr int64_t kBlockElements = int64_t{1} << 22;

// A matrix of the product's type; the library takes transposed ones as they are.
Tensor factor_as(const Tensor& factor, ScalarType type) {
  const Tensor plain = cuda::detach(factor);
  return plain.scalar_type() == type ? plain : torch::stable::to(plain, type);
}

void run_apply(const Tensors& codes, const Tensors& scale, const Tensors& zero, const Tensors& left,
               const Tensors& right, const Tensors& step, const std::vector<int64_t>& seeds, const Tensor& step_factor,
               const Tensor& lr, const std::optional<Tensor>& found_inf, double factor, double weight_decay,
               bool decay_after) {
  lowrank::check_int8_weights(codes, scale, zero, left, right, step, seeds, step_factor, lr, found_inf,
                              cuda::check_device);
  if (codes.empty()) return;
  const cuda::DeviceGuard guard(lr);
  const Stream stream = cuda::current_stream(lr);
  lowrank::Int8WeightParams params{};
  params.lr = cuda::input<void>(lr);
  params.lr_is_double = lowrank::is_double(lr);
  params.found_inf = cuda::input<float>(found_inf);
  params.factor = factor;
  params.weight_decay = weight_decay;
  params.decay_after = decay_after;
  const double* step_factors = cuda::input<double>(step_factor);
  for (size_t i = 0; i < codes.size(); ++i) {
    const int64_t rows = codes[i].size(0), columns = codes[i].size(1), groups = lowrank::affine_groups(columns);
    if (codes[i].numel() == 0) continue;
    // Where one factor has sixteen bits the other has no more to tell.
    const bool wide = left[i].scalar_type() == ScalarType::Float && right[i].scalar_type() == ScalarType::Float;
    const ScalarType type = wide                                              ? ScalarType::Float
                            : left[i].scalar_type() == ScalarType::Float ? right[i].scalar_type()
                                                                         : left[i].scalar_type();
    const Tensor a = factor_as(left[i], type), b = factor_as(right[i], type);
    const int64_t fitting = kBlockElements / columns, height = fitting < 1 ? 1 : fitting < rows ? fitting : rows;
    const Tensor update = cuda::empty(scale[i], {height, columns}, ScalarType::Float);
    params.columns = columns;
    params.seed = static_cast<uint64_t>(seeds[i]);
    params.step = cuda::input<float>(step[i]);
    params.step_factor = step_factors + i;
    uint8_t* const all_codes = cuda::output<uint8_t>(codes[i]);
    float* const all_scales = cuda::output<float>(scale[i]);
    float* const all_zeros = cuda::output<float>(zero[i]);
    for (int64_t first = 0; first < rows; first += height) {
      const int64_t count = rows - first < height ? rows - first : height;
      const Tensor product = cuda::part_of(update, 0, count);
      cuda::multiply(cuda::part_of(a, first, count), b, product);
      params.update = cuda::workspace<float>(product);
      params.rows = count;
      params.first_row = first;
      params.codes = all_codes + first * columns;
      params.scale = all_scales + first * groups;
      params.zero = all_zeros + first * groups;
      cuda::check_launch(lowrank::launch_int8_weights(params, stream), "low_rank_apply_int8");
    }
  }
}

}  // namespace

PYKERN_CUDA_IMPL(m) { m.impl("low_rank_apply_int8", TORCH_BOX(&run_apply)); }

}  // namespace pykern
