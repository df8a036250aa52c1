// From a type that is known when a launch is made to a kernel that was compiled for it: each returns what `launch`
// returns for a value of the type, or why there is no such kernel.
#pragma once

#include "kernels/common/numeric.h"

namespace pykern {

template <class Launch>
const char* with_any_type(DataType type, const Launch& launch) {
  switch (type) {
    case DataType::f32: return launch(float{});
    case DataType::f64: return launch(double{});
    case DataType::bf16: return launch(bf16{});
    case DataType::f16: return launch(f16{});
  }
  return "there is no kernel for this data type";
}

// The types of weights and activations.
template <class Launch>
const char* with_storage_type(DataType type, const Launch& launch) {
  switch (type) {
    case DataType::f32: return launch(float{});
    case DataType::bf16: return launch(bf16{});
    case DataType::f16: return launch(f16{});
    default: return "there is no kernel for float64";
  }
}

// The types of sums and statistics.
template <class Launch>
const char* with_wide_type(DataType type, const Launch& launch) {
  switch (type) {
    case DataType::f32: return launch(float{});
    case DataType::f64: return launch(double{});
    default: return "there are kernels for float32 and float64 alone";
  }
}

}  // namespace pykern
