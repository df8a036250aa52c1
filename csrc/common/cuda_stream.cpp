// The CUDA stream that torch works on. Nothing here may need libtorch_cuda when the library is loaded: the
// CUDA library also loads, and registers its ops, beside a CPU-only torch.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/cuda.h"

// In libtorch_cpu, which this library names as needed, from torch 2.13 on.
extern "C" __attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream, void** native_handle);

namespace pykern::cuda {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// In libtorch_cuda, in every torch built for CUDA. A weak symbol would stay null there: Python loads torch
// without RTLD_GLOBAL, and libtorch_cpu doesn't lead to libtorch_cuda. So the loaded library is asked by name.
CurrentStream find_current_stream() {
  const char* const name = "aoti_torch_get_current_cuda_stream";
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const found = library != nullptr ? dlsym(library, name) : nullptr;
  return reinterpret_cast<CurrentStream>(found != nullptr ? found : dlsym(RTLD_DEFAULT, name));
}

CurrentStream current_stream_of_torch() {
  static const CurrentStream found = find_current_stream();
  return found;
}

void check(AOTITorchError error) {
  STD_TORCH_CHECK(error == 0, "pykern: torch told no CUDA stream (error ", error, ")");
}

}  // namespace

const char* stream_source() {
  if (current_stream_of_torch() != nullptr) return "libtorch_cuda";
  return torch_stream_native_handle != nullptr ? "libtorch_cpu" : "none";
}

Stream current_stream(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  void* stream = nullptr;
  if (const CurrentStream current = current_stream_of_torch()) {
    check(current(device, &stream));
    return static_cast<Stream>(stream);
  }
  STD_TORCH_CHECK(torch_stream_native_handle != nullptr,
                  "pykern: this torch tells no CUDA stream; install a torch that is built for CUDA");
  StreamHandle handle = nullptr;
  check(aoti_torch_get_current_stream(device, &handle));
  const AOTITorchError error = torch_stream_native_handle(handle, &stream);
  aoti_torch_delete_stream(handle);
  check(error);
  return static_cast<Stream>(stream);
}

}  // namespace pykern::cuda
