// The CUDA stream that torch works on. Nothing here may need libtorch_cuda when the library is loaded: the
// CUDA library also loads, and registers its ops, beside a CPU-only torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/cuda.h"

// Torch from 2.13 on has the first, every torch built for CUDA the second.
extern "C" {
__attribute__((weak)) AOTITorchError torch_stream_native_handle(StreamHandle stream, void** native_handle);
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
}

namespace pykern::cuda {

Stream current_stream(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream != nullptr) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<Stream>(stream);
  }
  STD_TORCH_CHECK(torch_stream_native_handle != nullptr,
                  "pykern: this torch tells no CUDA stream; install a torch that is built for CUDA");
  StreamHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device, &handle));
  const AOTITorchError error = torch_stream_native_handle(handle, &stream);
  aoti_torch_delete_stream(handle);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return static_cast<Stream>(stream);
}

}  // namespace pykern::cuda
