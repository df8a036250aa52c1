// bfloat16 products on the tile registers: a tile holds 16 x 32 elements of A, 16 pairs of rows x
// 16 columns of B, or 16 x 16 float32 sums.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/numeric.h"
#include "common/tiles.h"

namespace pykern::PYKERN_SIMD {

// Up to 32 x 32 sums of C as 2 x 2 tiles. `a` points to full tiles: 32 readable rows, k a multiple
// of 32.
PYKERN_INLINE void amx_block(int64_t k, const bf16* a, int64_t a_row, const bf16* b, int64_t b_row, float* c,
                             int64_t c_row, bool accumulate) {
  const int64_t a_bytes = a_row * 2, b_bytes = b_row * 4, c_bytes = c_row * 4;
  if (accumulate) {
    tile_load<0>(c, c_bytes);
    tile_load<1>(c + 16, c_bytes);
    tile_load<2>(c + 16 * c_row, c_bytes);
    tile_load<3>(c + 16 * c_row + 16, c_bytes);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t step = 0; step < k; step += 32) {
    const bf16* pairs = b + step * b_row;
    tile_load<4>(a + step, a_bytes);
    tile_load<6>(pairs, b_bytes);
    tile_load<7>(pairs + 32, b_bytes);
    tile_multiply_bf16<0, 4, 6>();
    tile_multiply_bf16<1, 4, 7>();
    tile_load<5>(a + 16 * a_row + step, a_bytes);
    tile_multiply_bf16<2, 5, 6>();
    tile_multiply_bf16<3, 5, 7>();
  }
  tile_store<0>(c, c_bytes);
  tile_store<1>(c + 16, c_bytes);
  tile_store<2>(c + 16 * c_row, c_bytes);
  tile_store<3>(c + 16 * c_row + 16, c_bytes);
}

// See matmul(): n is a multiple of `panel` (itself a multiple of 32), k is even.
inline void amx_matmul(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t a_row, const bf16* b, int64_t panel,
                       float* c, int64_t c_row, bool accumulate) {
  constexpr int64_t kSlice = 256;
  alignas(64) bf16 a_tail[32 * kSlice];
  alignas(64) bf16 b_tail[16 * 64];
  alignas(64) float c_tail[32 * 32] = {};
  const TileScope tiles;
  for (int64_t step = 0; step < k; step += kSlice) {
    const int64_t depth = k - step < kSlice ? k - step : kSlice;
    const int64_t whole = depth / 32 * 32;
    const bool add = accumulate || step > 0;
    for (int64_t row = 0; row < m; row += 32) {
      const int64_t rows = m - row < 32 ? m - row : 32;
      const bf16* left = a + row * a_row + step;
      int64_t left_row = a_row;
      if (rows < 32 || whole < depth) {
        // Copied once for all columns: a tile load reads all of its rows, and a zero of B would not
        // silence a NaN behind the end of A.
        std::memset(a_tail, 0, sizeof a_tail);
        for (int64_t i = 0; i < rows; ++i) std::memcpy(a_tail + i * kSlice, left + i * a_row, depth * 2);
        left = a_tail;
        left_row = kSlice;
      }
      for (int64_t column = 0; column < n; column += 32) {
        const bf16* right = b + column / panel * panel * k + step * panel + column % panel * 2;
        float* sums = rows < 32 ? c_tail : c + row * c_row + column;
        const int64_t sums_row = rows < 32 ? 32 : c_row;
        if (rows < 32 && add) {
          for (int64_t i = 0; i < rows; ++i) std::memcpy(c_tail + i * 32, c + (row + i) * c_row + column, 128);
        }
        amx_block(whole, left, left_row, right, panel, sums, sums_row, add);
        if (whole < depth) {
          std::memset(b_tail, 0, sizeof b_tail);
          for (int64_t pair = 0; pair < (depth - whole) / 2; ++pair) {
            std::memcpy(b_tail + pair * 64, right + whole * panel + pair * 2 * panel, 128);
          }
          amx_block(32, left + whole, left_row, b_tail, 32, sums, sums_row, true);
        }
        if (rows < 32) {
          for (int64_t i = 0; i < rows; ++i) std::memcpy(c + (row + i) * c_row + column, c_tail + i * 32, 128);
        }
      }
    }
  }
}

}  // namespace pykern::PYKERN_SIMD
