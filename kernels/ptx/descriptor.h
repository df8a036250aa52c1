// The 64-bit descriptor of a matrix in shared memory, which wgmma takes. Plain C++.
//
// A tile is made of rows of 16 bytes times 1, 2, 4 or 8 (no swizzle, 32, 64, 128 bytes: the span), 8 rows together.
// Offsets of 2-byte elements, before the swizzle:
//
//   k innermost, swizzled     mn / 8 * stride + mn % 8 * span + 2 k                         (leading is not used)
//   k innermost, none         mn / 8 * stride + mn % 8 * 16 + k / 8 * leading + 2 (k % 8)
//   mn innermost, swizzled    k / 8 * stride + k % 8 * span + mn / (span / 2) * leading + 2 (mn % (span / 2))
//   mn innermost, none        k / 8 * leading + k % 8 * 16 + mn / 8 * stride + 2 (mn % 8)
//
// mn is m of A or n of B. The swizzle works on bits of the address itself, so a tile begins at a multiple of 8 spans;
// steps along k within a span are added to the descriptor's address.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYKERN_ANYWHERE __host__ __device__
#else
#define PYKERN_ANYWHERE
#endif

namespace pykern::ptx {

enum class Swizzle : int { none, bytes32, bytes64, bytes128 };

// Which index is innermost in memory.
enum class Major : int { k, mn };

constexpr PYKERN_ANYWHERE uint32_t swizzle_span(Swizzle swizzle) { return 16u << static_cast<int>(swizzle); }

// Where the swizzle puts the byte at this address: bits 4 to 6 change by the bits three places higher.
constexpr PYKERN_ANYWHERE uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  return address ^ ((address >> 3) & (((1u << static_cast<int>(swizzle)) - 1) << 4));
}

struct MatrixDescriptor {
  uint32_t address = 0;  // of shared memory
  uint32_t leading = 0;  // bytes
  uint32_t stride = 0;   // bytes
  uint32_t base_offset = 0;
  Swizzle swizzle = Swizzle::none;
};

// Addresses and offsets are multiples of 16 below 2^18.
constexpr PYKERN_ANYWHERE uint64_t encode(const MatrixDescriptor& matrix) {
  const int swizzle = static_cast<int>(matrix.swizzle);
  return uint64_t{(matrix.address & 0x3ffffu) >> 4} | uint64_t{(matrix.leading & 0x3ffffu) >> 4} << 16 |
         uint64_t{(matrix.stride & 0x3ffffu) >> 4} << 32 | uint64_t{matrix.base_offset & 7u} << 49 |
         static_cast<uint64_t>(swizzle == 0 ? 0 : 4 - swizzle) << 62;
}

constexpr PYKERN_ANYWHERE MatrixDescriptor decode(uint64_t bits) {
  const int code = static_cast<int>(bits >> 62);
  return {static_cast<uint32_t>(bits & 0x3fff) << 4, static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4, static_cast<uint32_t>(bits >> 49 & 7),
          static_cast<Swizzle>(code == 0 ? 0 : 4 - code)};
}

// The same matrix, `bytes` further on; bytes is a multiple of 16.
constexpr PYKERN_ANYWHERE uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Offset of element (mn, k) from the descriptor's address, before the swizzle.
constexpr PYKERN_ANYWHERE uint32_t element_offset(const MatrixDescriptor& matrix, Major major, uint32_t mn,
                                                  uint32_t k) {
  const uint32_t span = swizzle_span(matrix.swizzle), wide = span / 2;
  if (major == Major::k) {
    const uint32_t row = mn / 8 * matrix.stride + mn % 8 * span;
    return matrix.swizzle == Swizzle::none ? row + k / 8 * matrix.leading + k % 8 * 2 : row + k * 2;
  }
  const uint32_t row = k % 8 * span + mn % wide * 2;
  return matrix.swizzle == Swizzle::none ? row + k / 8 * matrix.leading + mn / 8 * matrix.stride
                                         : row + k / 8 * matrix.stride + mn / wide * matrix.leading;
}

}  // namespace pykern::ptx
