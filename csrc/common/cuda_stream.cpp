// The CUDA stream that torch works on. Nothing here may need libtorch_cuda when the library is loaded: the
// CUDA library also loads, and registers its ops, beside a CPU-only torch.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/cuda.h"

namespace pykern::cuda {
namespace {

// A function of a torch library that this process has loaded, or null. A weak symbol would stay null for
// libtorch_cuda: Python loads torch without RTLD_GLOBAL, and libtorch_cpu, which this library names as
// needed, doesn't lead there. Nor may a symbol that only newer torches have stand in the symbol table.
template <class Function>
Function* find(const char* library, const char* name) {
  void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  void* const found = loaded != nullptr ? dlsym(loaded, name) : nullptr;
  return reinterpret_cast<Function*>(found != nullptr ? found : dlsym(RTLD_DEFAULT, name));
}

struct StreamFunctions {
  // In every torch built for CUDA.
  AOTITorchError (*current)(int32_t device_index, void** stream) =
      find<AOTITorchError(int32_t, void**)>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  // From torch 2.13 on.
  AOTITorchError (*native_handle)(StreamHandle stream, void** native_handle) =
      find<AOTITorchError(StreamHandle, void**)>("libtorch_cpu.so", "torch_stream_native_handle");
};

const StreamFunctions& functions() {
  static const StreamFunctions found;
  return found;
}

void check(AOTITorchError error) {
  STD_TORCH_CHECK(error == 0, "pykern: torch told no CUDA stream (error ", error, ")");
}

}  // namespace

const char* stream_source() {
  if (functions().current != nullptr) return "libtorch_cuda";
  return functions().native_handle != nullptr ? "libtorch_cpu" : "none";
}

Stream current_stream(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  void* stream = nullptr;
  if (functions().current != nullptr) {
    check(functions().current(device, &stream));
    return static_cast<Stream>(stream);
  }
  STD_TORCH_CHECK(functions().native_handle != nullptr,
                  "pykern: this torch tells no CUDA stream; install a torch that is built for CUDA");
  StreamHandle handle = nullptr;
  check(aoti_torch_get_current_stream(device, &handle));
  const AOTITorchError error = functions().native_handle(handle, &stream);
  aoti_torch_delete_stream(handle);
  check(error);
  return static_cast<Stream>(stream);
}

}  // namespace pykern::cuda
