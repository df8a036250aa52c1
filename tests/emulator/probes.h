// Small kernels that show what one built-in function of the emulator does.
#pragma once

#include <cstdint>

namespace pykern::emulator {

struct Probe {
  const char* name;
  // One value in and one out for each of `size` threads, in blocks of `threads`. Null, or the report.
  const char* (*run)(int64_t size, int threads, int argument, const float* input, float* output);
};

// Ends with an entry without a name.
const Probe* probes();

}  // namespace pykern::emulator
