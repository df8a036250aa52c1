#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/lowrank/adamw_sm80.cuh"

namespace pykern::lowrank {
namespace {

// Elements before the first that is aligned to sixteen bytes.
template <class T>
int unaligned_head(const void* pointer) {
  return static_cast<int>((16 - reinterpret_cast<uintptr_t>(pointer) % 16) % 16 / sizeof(T));
}

template <class T>
AdamWTensor prepared(AdamWTensor tensor) {
  using C = Compute<T>;
  tensor.head = unaligned_head<T>(tensor.param);
  const bool aligned = allows_packs(static_cast<const T*>(tensor.param) + tensor.head) &&
                       allows_packs(static_cast<const T*>(tensor.grad) + tensor.head) &&
                       allows_packs(static_cast<const C*>(tensor.exp_avg) + tensor.head) &&
                       allows_packs(static_cast<const C*>(tensor.exp_avg_sq) + tensor.head);
  tensor.packs = aligned && tensor.size > tensor.head ? (tensor.size - tensor.head) / Pack<T>::kSize : 0;
  return tensor;
}

template <class T>
const char* launch_typed(const AdamWParams& params, const AdamWTensor* tensors, int64_t count, Stream stream) {
  AdamWTable table;
  return launch_grouped(
      table, count, [&](int64_t i) { return prepared<T>(tensors[i]); },
      [&](int64_t i) {
        const int64_t packs = prepared<T>(tensors[i]).packs;
        const int64_t per_block = packs > 0 ? kAdamWThreads : kAdamWThreads * kAdamWScalars;
        return ((packs > 0 ? packs : tensors[i].size) + per_block - 1) / per_block;
      },
      [&](const AdamWTable& filled) {
        return launch(adamw_kernel<T>, Grid{dim3(filled.tiles), dim3(kAdamWThreads)}, stream, filled, params);
      });
}

}  // namespace

const char* launch_adamw(const AdamWParams& params, const AdamWTensor* tensors, int64_t count, Stream stream) {
  return with_any_type(params.type, [&](auto value) {
    return launch_typed<decltype(value)>(params, tensors, count, stream);
  });
}

}  // namespace pykern::lowrank
