#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/offload/pointwise_sm80.cuh"

namespace pykern {
namespace {

// Enough blocks to fill the device several times over, so that none works alone at the end.
Grid grid_of(int64_t groups) {
  const int64_t needed = (groups + kPointwiseThreads - 1) / kPointwiseThreads, most = int64_t{multiprocessors()} * 32;
  return {dim3(static_cast<unsigned>(needed < most ? needed : most)), dim3(kPointwiseThreads)};
}

template <class T, bool backward>
const char* launch_typed(const ActivationParams& p, Stream stream) {
  const auto allows = [](const void* pointer) { return allows_packs(static_cast<const T*>(pointer)); };
  const bool packed = allows(p.gate) && allows(p.up) && allows(p.grad) && allows(p.gate_out) && allows(p.up_out);
  const Grid grid = grid_of(packed ? (p.count + Pack<T>::kSize - 1) / Pack<T>::kSize : p.count);
  return launch(packed ? activation_kernel<T, backward, true> : activation_kernel<T, backward, false>, grid, stream, p);
}

template <class T>
const char* launch_typed(const ActivationParams& params, Stream stream) {
  return params.grad ? launch_typed<T, true>(params, stream) : launch_typed<T, false>(params, stream);
}

template <class T>
const char* launch_typed(const DropoutParams& p, Stream stream) {
  const bool packed = allows_packs(static_cast<const T*>(p.x)) && allows_packs(static_cast<const T*>(p.y));
  const int64_t size = packed ? Pack<T>::kSize : 4;
  const Grid grid = grid_of((p.count + size - 1) / size);
  return launch(packed ? dropout_kernel<T, true> : dropout_kernel<T, false>, grid, stream, p);
}

}  // namespace

const char* launch_activation(DataType type, const ActivationParams& params, Stream stream) {
  return with_storage_type(type, [&](auto value) { return launch_typed<decltype(value)>(params, stream); });
}

const char* launch_dropout(DataType type, const DropoutParams& params, Stream stream) {
  return with_storage_type(type, [&](auto value) { return launch_typed<decltype(value)>(params, stream); });
}

}  // namespace pykern
