// From a storage type that is known when a launch is made to a kernel that was compiled for it.
#pragma once

#include "kernels/common/numeric.h"

namespace pykern {

// What `launch` returns for a value of the type; float64 has no kernels.
template <class Launch>
const char* with_storage_type(DataType type, const Launch& launch) {
  switch (type) {
    case DataType::f32: return launch(float{});
    case DataType::bf16: return launch(bf16{});
    case DataType::f16: return launch(f16{});
    default: return "float64 has no kernel";
  }
}

}  // namespace pykern
