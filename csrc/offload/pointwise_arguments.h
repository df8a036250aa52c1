// What the CPU and the CUDA side of activation functions and dropout share: checks and parameters.
#pragma once

#include <cmath>
#include <optional>

#include "common/checks.h"
#include "kernels/offload/pointwise.h"

namespace pykern {

inline void check_like(const Tensor& tensor, const Tensor& like, const char* name, DeviceCheck check_device) {
  check_device(tensor, name);
  check_contiguous(tensor, name);
  check_type(tensor, like.scalar_type(), name);
  STD_TORCH_CHECK(tensor.numel() == like.numel(), name, ": expected ", like.numel(), " elements, got ",
                  tensor.numel());
}

inline Activation check_activation(const Tensor& gate, const std::optional<Tensor>& up, int64_t kind,
                                   DeviceCheck check_device) {
  check_like(gate, gate, "gate", check_device);
  if (up) check_like(*up, gate, "up", check_device);
  STD_TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Activation::gelu_tanh), "kind: no activation ", kind);
  return static_cast<Activation>(kind);
}

// A share p of elements becomes 0, and the others are multiplied by 1 / (1 - p).
struct DropoutRule {
  uint64_t threshold;
  double scale;
};

inline DropoutRule check_dropout(const Tensor& x, const Tensor& seed, double p, DeviceCheck check_device) {
  check_like(x, x, "x", check_device);
  check_device(seed, "seed");
  check_type(seed, ScalarType::Long, "seed");
  STD_TORCH_CHECK(seed.numel() == 1, "seed: expected one element, got ", seed.numel());
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p: expected a share from 0 to 1, got ", p);
  return {static_cast<uint64_t>(std::llround(p * 4294967296.0)), p < 1 ? 1 / (1 - p) : 0.0};
}

}  // namespace pykern
