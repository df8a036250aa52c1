// What every csrc/F/cuda*.cpp needs on the way of a call: check, device guard, allocate, parameters,
// stream, launch, launch check.
//
// The same files are compiled a second time for the emulator (PYKERN_EMULATED): there the tensors lie on
// the CPU, the ops are registered for the CPU in the namespace pykern_emulated, and every tensor that is
// handed to a kernel through input(), output() or workspace() is announced to the emulator, which
// reports any access elsewhere.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/checks.h"
#include "common/library.h"
#include "kernels/common/stream.h"
#ifdef PYKERN_EMULATED
#include "kernels/emulator/memory.h"
#endif

namespace pykern::cuda {

using torch::stable::new_empty;
using torch::stable::new_zeros;

#ifdef PYKERN_EMULATED

inline void check_device(const Tensor& tensor, const char* name) { check_cpu(tensor, name); }

// First to last byte, whatever the strides.
inline int64_t extent(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return (last + 1) * tensor.element_size();
}

template <class T = void>
const T* input(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  emulator::announce(const_cast<void*>(data), extent(tensor), emulator::Access::read);
  return static_cast<const T*>(data);
}
template <class T = void>
T* output(const Tensor& tensor) {
  emulator::announce(tensor.mutable_data_ptr(), extent(tensor), emulator::Access::write);
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T = void>
T* workspace(const Tensor& tensor) {
  emulator::announce(tensor.mutable_data_ptr(), extent(tensor), emulator::Access::scratch);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Memory as cudaMalloc gives it: nobody may count on what is in there, so it holds NaN.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  Tensor tensor = new_empty(like, sizes, type);
  emulator::poison(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

// Begins an op: forgets the memory of the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor&) { emulator::forget_all(); }
  ~DeviceGuard() { emulator::forget_all(); }
  DeviceGuard(const DeviceGuard&) = delete;
};

inline Stream current_stream(const Tensor&) { return nullptr; }

#else

inline void check_device(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, ": expected a CUDA tensor");
}

template <class T = void>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T = void>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
// Memory that a kernel writes and reads, and whose last content is nobody's result.
template <class T = void>
T* workspace(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  return new_empty(like, sizes, type);
}

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.get_device_index()) {}
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream that torch works on for the tensor's device (csrc/common/cuda_stream.cpp).
Stream current_stream(const Tensor& tensor);
// The torch library that tells it: "libtorch_cuda", "libtorch_cpu", or "none".
const char* stream_source();

#endif

inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": the kernel could not be launched: ", error);
}

template <class T = void>
const T* input(const std::optional<Tensor>& tensor) {
  return tensor ? input<T>(*tensor) : nullptr;
}

}  // namespace pykern::cuda

#ifdef PYKERN_EMULATED
#define PYKERN_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(PYKERN_NAMESPACE, CPU, m)
#else
#define PYKERN_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(PYKERN_NAMESPACE, CUDA, m)
#endif
