// Groups of kernels/lowrank/affine.h, a vector at a time. Include from *.simd.cpp files only.
#pragma once

#include "common/vector.h"
#include "kernels/lowrank/affine.h"

namespace pykern::PYKERN_SIMD {

using lowrank::kAffineGroup;

struct AffineScale {
  float scale, zero;
};

// Of the first `count` values. What is behind them is overwritten.
inline AffineScale scale_of_group(float* values, int64_t count, int bits) {
  for (int64_t i = count; i % kLanes != 0; ++i) values[i] = values[0];
  vfloat smallest = load(values), largest = smallest;
  vint finite = broadcast(-1);
  for (int64_t i = 0; i < count; i += kLanes) {
    const vfloat value = load(values + i);
    smallest = minimum(value, smallest);
    largest = maximum(value, largest);
    finite &= ((vint)value & 0x7f800000) != 0x7f800000;
  }
  const float zero = -max_lanes(-smallest), range = max_lanes(largest) - zero;
  bool whole = range <= __FLT_MAX__;
  for (int lane = 0; lane < kLanes; ++lane) whole &= finite[lane] != 0;
  if (!whole) return {__builtin_nanf(""), __builtin_nanf("")};
  return {range / lowrank::largest_code(bits), zero};
}

// The codes before they are rounded; zero where the group has one value or none that is a number.
struct CodeScale {
  vfloat scale, zero, largest;
  bool empty;

  PYKERN_INLINE CodeScale(const AffineScale& group, int bits)
      : scale(broadcast(group.scale)),
        zero(broadcast(group.zero)),
        largest(broadcast(lowrank::largest_code(bits))),
        empty(!(group.scale > 0)) {}

  PYKERN_INLINE vfloat operator()(vfloat value) const {
    if (empty) return vfloat{};
    return minimum((value - zero) / scale, largest);
  }
};

// Groups have as many codes as a vector times a whole number; a row's last may have fewer, and room for all.
PYKERN_INLINE void store_codes(uint8_t* target, const int32_t* codes, int64_t count, int bits) {
  if (bits == 8) {
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<uint8_t>(codes[i]);
  } else {
    for (int64_t i = 0; i < count / 2; ++i) target[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    if (count % 2 != 0) target[count / 2] = static_cast<uint8_t>(codes[count - 1]);
  }
}

PYKERN_INLINE void load_group(float* values, const uint8_t* codes, int64_t count, int bits, AffineScale group) {
  if (bits == 8) {
    for (int64_t i = 0; i < count; ++i) values[i] = group.zero + group.scale * static_cast<float>(codes[i]);
  } else {
    for (int64_t i = 0; i < count / 2; ++i) {
      values[2 * i] = group.zero + group.scale * static_cast<float>(codes[i] & 15);
      values[2 * i + 1] = group.zero + group.scale * static_cast<float>(codes[i] >> 4);
    }
    if (count % 2 != 0) values[count - 1] = group.zero + group.scale * static_cast<float>(codes[count / 2] & 15);
  }
}

}  // namespace pykern::PYKERN_SIMD
