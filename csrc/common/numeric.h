// Storage types. No torch header here: *.simd.cpp files include this one.
#pragma once

#include <cstdint>

// For small functions outside a level's namespace that *.simd.cpp files call: were one of them left
// out of line, the linker could keep its AVX-512 copy for every caller.
#define PYKERN_INLINE inline __attribute__((always_inline))

namespace pykern {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class DataType : int { f32, f64, bf16, f16 };

}  // namespace pykern
