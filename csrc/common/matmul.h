// Matrix products that stay in cache: C[m, n] (+)= A[m, k] B[k, n], accumulated in float32.
// Include from *.simd.cpp files only. B is packed once (pack.h) and used many times.
//
// C must have room for round_up(n, kPanel) columns: the products write whole panels.
#pragma once

#include "common/pack.h"

#if defined(PYKERN_SIMD_IS_amx) || defined(PYKERN_TILE_TWIN)
#include "common/amx.h"
#endif

namespace pykern::PYKERN_SIMD {

constexpr int kBlockRows = 6;

namespace detail {

template <int Rows>
PYKERN_INLINE void block(int64_t k, const float* a, int64_t a_row, int64_t a_column, const float* b, float* c,
                         int64_t c_row, bool accumulate) {
  vfloat sum[Rows][kPanelVectors];
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) sum[row][v] = zero();
  }
  for (int64_t step = 0; step < k; ++step) {
    vfloat column[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) column[v] = load(b + step * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      const vfloat factor = broadcast(a[row * a_row + step * a_column]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) sum[row][v] += factor * column[v];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      float* target = c + row * c_row + v * kLanes;
      // Added at the end: a sum of short sums rounds less than one long sum.
      store(target, accumulate ? load(target) + sum[row][v] : sum[row][v]);
    }
  }
}

#if defined(__AVX512BF16__)
// `k` even; a's columns are contiguous, and its element k - 1 must be readable (pad odd rows).
template <int Rows>
PYKERN_INLINE void block(int64_t k, const bf16* a, int64_t a_row, int64_t, const bf16* b, float* c, int64_t c_row,
                         bool accumulate) {
  __m512 sum[Rows][kPanelVectors];
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) sum[row][v] = _mm512_setzero_ps();
  }
  for (int64_t step = 0; step < k; step += 2) {
    __m512bh column[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + step * kPanel + v * 32);
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      int32_t pair;
      std::memcpy(&pair, a + row * a_row + step, 4);
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) sum[row][v] = _mm512_dpbf16_ps(sum[row][v], factor, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      float* target = c + row * c_row + v * kLanes;
      store(target, accumulate ? load(target) + (vfloat)sum[row][v] : (vfloat)sum[row][v]);
    }
  }
}
#endif

template <class T>
void panel(int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b, float* c, int64_t c_row,
           bool accumulate) {
  int64_t row = 0;
  for (; row + kBlockRows <= m; row += kBlockRows) {
    block<kBlockRows>(k, a + row * a_row, a_row, a_column, b, c + row * c_row, c_row, accumulate);
  }
  a += row * a_row;
  c += row * c_row;
  switch (m - row) {
    case 5: return block<5>(k, a, a_row, a_column, b, c, c_row, accumulate);
    case 4: return block<4>(k, a, a_row, a_column, b, c, c_row, accumulate);
    case 3: return block<3>(k, a, a_row, a_column, b, c, c_row, accumulate);
    case 2: return block<2>(k, a, a_row, a_column, b, c, c_row, accumulate);
    case 1: return block<1>(k, a, a_row, a_column, b, c, c_row, accumulate);
    default: return;
  }
}

}  // namespace detail

// The product. A's element (row, step) is a[row * a_row + step * a_column]; for bfloat16 a_column
// must be 1 and an odd k must be readable one element further (that element meets a zero of B, so
// it must be finite: see convert_rows).
template <class T>
void matmul(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b_packed, float* c,
            int64_t c_row, bool accumulate) {
  // Deep products run in slices, so that a slice of one panel stays in the first-level cache.
  constexpr int64_t kSlice = 512 / sizeof(T);
  const int64_t padded_k = round_up(k, kDepth<T>);
  if (padded_k == 0 && !accumulate) {
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t column = 0; column < round_up(n, kPanel); ++column) c[row * c_row + column] = 0.0f;
    }
  }
#if defined(PYKERN_SIMD_IS_amx)
  if constexpr (sizeof(T) == 2) {
    if (m >= 8) return amx_matmul(m, round_up(n, kPanel), padded_k, a, a_row, b_packed, kPanel, c, c_row, accumulate);
  }
#endif
  for (int64_t step = 0; step < padded_k; step += kSlice) {
    const int64_t depth = padded_k - step < kSlice ? padded_k - step : kSlice;
    for (int64_t column = 0; column < n; column += kPanel) {
      detail::panel(m, depth, a + step * a_column, a_row, a_column, b_packed + column * padded_k + step * kPanel,
                    c + column, c_row, accumulate || step > 0);
    }
  }
}

}  // namespace pykern::PYKERN_SIMD
