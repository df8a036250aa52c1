// How kernels/F/launch.cu starts a kernel, on a GPU and on the emulator alike.
#pragma once

#include <cstddef>

#include "kernels/common/device.h"
#include "kernels/common/stream.h"

namespace pykern {

struct Grid {
  dim3 blocks, threads;
  size_t dynamic_shared = 0;
};

#if defined(__CUDACC__)
// Lets a kernel have all dynamic shared memory there is: the same value whatever this launch needs, since one that
// another thread starts may need more.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most - static_cast<int>(attributes.sharedSizeBytes));
}
#endif

// Null, or why the launch failed. A grid without blocks is an error of the caller.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Grid& grid, Stream stream, const Arguments&... arguments) {
#if defined(__CUDACC__)
  // A block has 48 KiB unasked, of which the kernel's static shared memory takes its part.
  if (grid.dynamic_shared > 16 * 1024) {
    const cudaError_t raised = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    if (raised != cudaSuccess) return cudaGetErrorString(raised);
  }
  kernel<<<grid.blocks, grid.threads, grid.dynamic_shared, stream>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
#else
  (void)stream;
  const auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(static_cast<Parameters>(arguments)...); };
  return emulator::launch(grid.blocks, grid.threads, grid.dynamic_shared, {emulator::invoke<decltype(call)>, &call});
#endif
}

// Number of multiprocessors of the current device; on the emulator a small number, so that loops over
// tiles take more than one turn.
inline int multiprocessors() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
#else
  return 4;
#endif
}

// Of the current device, times ten: 90 is 9.0. The emulator is what its tests say it is.
inline int compute_capability() {
#if defined(__CUDACC__)
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
#else
  return emulator::compute_capability();
#endif
}

}  // namespace pykern
