// Ops about the CUDA library itself; they exist where it is loaded.
#ifndef PYKERN_EMULATED

#include <torch/headeronly/version.h>

#include <string>

#include "common/cuda.h"

namespace pykern {
namespace {

std::string architectures() { return PYKERN_CUDA_ARCHITECTURES; }
std::string built_with() { return PYKERN_CUDA_COMPILER ", headers of torch " TORCH_VERSION; }
std::string stream_source() { return cuda::stream_source(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def("cuda_architectures() -> str");
  m.def("cuda_built_with() -> str");
  m.def("cuda_stream_source() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(PYKERN_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&architectures));
  m.impl("cuda_built_with", TORCH_BOX(&built_with));
  m.impl("cuda_stream_source", TORCH_BOX(&stream_source));
}

}  // namespace pykern

#endif
