// The dynamic 8-bit maps of block-wise quantised moments: tables made by the compiler from their rule.
//
// Seven levels, each a decade: level l spans [10^(l-7), 10^(l-6)] in 2^l (signed) or 2^(l+1) (unsigned)
// cells of equal width, and a code stands for the middle of its cell. Zero and one complete the map; signed,
// the cells are mirrored and minus one is left out. Codes number the values in rising order, so that zero is
// code 127 (signed) or 0 (unsigned). pykern/reference/lowrank.py has the same rule.
//
// A block is kQuantBlock neighbours in one row of a moment [rank, length], whose rows belong to one basis
// vector each; a row's last block may be shorter. It has one float32 scale, its largest magnitude.
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"

namespace pykern::lowrank {

constexpr int kQuantBlock = 256;
constexpr int kCodes = 256;
constexpr int kLevels = 7;

// A largest magnitude below this has no finite reciprocal worth having: the block counts as zero.
constexpr float kSmallestScale = 1.2e-38f;

// Where a magnitude of at least `begin` finds its cell: number first + min(floor(x * slope + offset), last).
struct Level {
  float begin, slope, offset;
  int first, last;
};

struct DynamicMap {
  float values[kCodes];
  Level levels[kLevels];
  float smallest, top;  // below `smallest` the nearest value is zero; from `top` on it is one
  bool is_signed;
};

constexpr DynamicMap make_dynamic_map(bool is_signed) {
  DynamicMap map{};
  map.is_signed = is_signed;
  const int zero = is_signed ? 127 : 0;
  double decade = 1e-6, before = 0;  // before: the value of the code below
  int code = zero, cells = is_signed ? 1 : 2;
  map.values[zero] = 0.0f;
  for (int level = 0; level < kLevels; ++level) {
    const int first = code + 1 - zero;
    for (int cell = 0; cell < cells; ++cell) {
      const double value = decade * (0.1 + 0.9 * (cell + 0.5) / cells);
      ++code;
      map.values[code] = static_cast<float>(value);
      if (is_signed) map.values[2 * zero - code] = -static_cast<float>(value);
      // Nearest: a level begins half way up from the value below it.
      if (cell == 0) {
        const double begin = (before + value) / 2;
        if (level == 0) map.smallest = static_cast<float>(begin);
        map.levels[level] = {static_cast<float>(begin), static_cast<float>(cells / (0.9 * decade)),
                             static_cast<float>(-cells / 9.0), first, cells - 1};
      }
      before = value;
    }
    decade = level == 0 ? 1e-5 : level == 1 ? 1e-4 : level == 2 ? 1e-3 : level == 3 ? 1e-2 : level == 4 ? 1e-1 : 1.0;
    cells *= 2;
  }
  map.values[kCodes - 1] = 1.0f;
  map.top = static_cast<float>((before + 1.0) / 2);
  return map;
}

constexpr DynamicMap kSignedMap = make_dynamic_map(true);
constexpr DynamicMap kUnsignedMap = make_dynamic_map(false);

PYKERN_HOST_DEVICE int64_t quant_blocks(int64_t length) { return (length + kQuantBlock - 1) / kQuantBlock; }

// The factor that brings a block's values into [-1, 1], and zero for a block that counts as zero. A NaN stays.
PYKERN_HOST_DEVICE float reciprocal_scale(float largest) { return largest < kSmallestScale ? 0.0f : 1.0f / largest; }

// The larger magnitude; a NaN wins.
PYKERN_HOST_DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

}  // namespace pykern::lowrank
