// The inner loop of matrix products, four floats at a time on any processor.
#pragma once

namespace pykern::emulator {

typedef float Four __attribute__((vector_size(16), may_alias));

// Two rows of eight: d0 += a0 b, d1 += a1 b in the order of k, each sum rounded. Rows of b lie `stride` floats apart;
// d and b are 16-byte aligned. The sums of two rows do not wait for each other.
template <int depth>
inline void multiply_two_rows(float* d0, float* d1, const float* a0, const float* a1, const float* b, int stride) {
  auto *first = reinterpret_cast<Four*>(d0), *second = reinterpret_cast<Four*>(d1);
  Four s0 = first[0], s1 = first[1], s2 = second[0], s3 = second[1];
  for (int k = 0; k < depth; ++k) {
    const auto* factors = reinterpret_cast<const Four*>(b + k * stride);
    s0 += a0[k] * factors[0];
    s1 += a0[k] * factors[1];
    s2 += a1[k] * factors[0];
    s3 += a1[k] * factors[1];
  }
  first[0] = s0;
  first[1] = s1;
  second[0] = s2;
  second[1] = s3;
}

}  // namespace pykern::emulator
