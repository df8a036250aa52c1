// Storage types. No torch, CUDA or standard library header beyond <cstdint>: host files that are
// compiled once per instruction set include this one too.
#pragma once

#include <cstdint>

namespace pykern {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DataType : int { f32, f64, bf16, f16 };

}  // namespace pykern
