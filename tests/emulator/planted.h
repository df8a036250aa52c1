// Small kernels with one bug each, and the same without it.
#pragma once

#include <cstdint>

namespace pykern::emulator {

struct Planted {
  const char* name;
  // Null, or the emulator's report.
  const char* (*run)(bool buggy, const float* input, int64_t size, float* output);
};

// Each ends with an entry without a name.
const Planted* planted_kernels();
const Planted* planted_async_kernels();

}  // namespace pykern::emulator
