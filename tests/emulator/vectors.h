// Small kernels around single PTX functions: run on the emulator by the tests, and on a GPU to record what the
// hardware makes of the same input.
#pragma once

#include <cstdint>

#include "kernels/common/stream.h"

namespace pykern::vectors {

struct VectorOptions {
  int64_t values[24];
};

struct Vector {
  const char* name;
  // Null, or what went wrong. Input and output are memory that kernels may use.
  const char* (*run)(const VectorOptions& options, const char* input, int64_t input_bytes, char* output, Stream stream);
};

// Each ends with an entry without a name; the second is null where only sm_80 was compiled.
const Vector* vectors_sm80();
const Vector* vectors_sm90();

}  // namespace pykern::vectors
