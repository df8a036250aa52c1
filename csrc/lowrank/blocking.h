// How the products of the low-rank parts are cut, and what they share. Include from *.simd.cpp files only.
//
// The axis that is kept is cut into tiles that need nothing of each other: blocks of rows or columns by the matrix's
// size alone, so that results don't depend on the number of threads.
#pragma once

#include <type_traits>

#include "common/matmul.h"
#include "common/scratch.h"
#include "common/vector_part.h"

namespace pykern::PYKERN_SIMD {

constexpr int64_t kSliceDepth = 256;    // compressed axis, elements per slice of a projection
constexpr int64_t kUpdateWidth = 512;   // compressed axis in memory order: elements per slice of an up-projection
constexpr int64_t kUpdateHeight = 96;   // compressed axis across it

// Lines of the kept axis per tile where the compressed one is contiguous, and where the kept one is.
PYKERN_INLINE int64_t tile_of_lines(int64_t lines) { return lines >= 1536 ? 96 : lines >= 384 ? 48 : 24; }
PYKERN_INLINE int64_t tile_of_columns(int64_t columns) {
  return round_up(columns >= 4096 ? 256 : columns >= 1024 ? 128 : 64, kPanel);
}

// target [columns, rows] = the transpose of source [rows, columns], times `factor`, converted.
template <class To, class From>
PYKERN_INLINE void transpose_block(To* target, int64_t target_stride, const From* source, int64_t source_stride,
                                   int64_t rows, int64_t columns, float factor) {
  for (int64_t row0 = 0; row0 < rows; row0 += kLanes) {
    const int64_t height = lesser(kLanes, rows - row0);
    for (int64_t column0 = 0; column0 < columns; column0 += kLanes) {
      const int64_t width = lesser(kLanes, columns - column0);
      vuint lines[kLanes];
      for (int64_t row = 0; row < kLanes; ++row) {
        const From* from = source + (row0 + row) * source_stride + column0;
        const vfloat value = row < height ? load_some(from, width) : zero();
        lines[row] = (vuint)(value * factor);
      }
      detail::transpose<kLanes>(lines);
      for (int64_t column = 0; column < width; ++column) {
        To* to = target + (column0 + column) * target_stride + row0;
        store_some(to, (vfloat)lines[column], height);
      }
    }
  }
}

// Whether the products can take rows of T as they lie, without a copy in the type they are taken in.
template <class T>
PYKERN_INLINE constexpr bool taken_as_is(int64_t depth) {
  return std::is_same_v<T, compute_t<T>> && depth % kDepth<compute_t<T>> == 0;
}

}  // namespace pykern::PYKERN_SIMD
