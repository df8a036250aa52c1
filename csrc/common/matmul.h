// Matrix products that stay in cache: C[m, n] (+)= A[m, k] B[k, n], accumulated in float32.
// Include from *.simd.cpp files only.
//
// B is packed once and used many times. A packed B is a row of panels, each kPanel columns wide
// and all of k deep; in a panel, `kDepth<T>` successive rows of one column lie side by side, which
// is the operand layout of both the AVX-512 and the AMX bfloat16 dot product. Columns past n and
// rows past k are zero.
//
// C must have room for round_up(n, kPanel) columns: the products write whole panels.
#pragma once

#include "common/numeric.h"
#include "common/scratch.h"
#include "common/vector.h"

#if defined(__AMX_BF16__)
#include "common/amx.h"
#endif

namespace pykern::PYKERN_SIMD {

// The type in which the products of T are taken: bfloat16 stays narrow where the level has a dot
// product for it, everything else is float32.
template <class T>
struct ComputeType {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct ComputeType<bf16> {
  using type = bf16;
};
#endif
template <class T>
using compute_t = typename ComputeType<T>::type;

#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif
constexpr int kPanel = kPanelVectors * kLanes;
constexpr int kBlockRows = 6;

template <class T>
constexpr int kDepth = 1;
template <>
inline constexpr int kDepth<bf16> = 2;

// Elements of a packed B.
template <class T>
PYKERN_INLINE int64_t packed_size(int64_t k, int64_t n) {
  return round_up(k, kDepth<T>) * round_up(n, kPanel);
}

// Packs B, whose element (row, column) is source[row * row_stride + column * column_stride],
// converting from its storage type.
template <class T, class Source>
void pack(T* packed, const Source* source, int64_t k, int64_t n, int64_t row_stride, int64_t column_stride) {
  constexpr int depth = kDepth<T>;
  const int64_t padded_k = round_up(k, depth);
  for (int64_t column0 = 0; column0 < n; column0 += kPanel) {
    const int64_t columns = n - column0 < kPanel ? n - column0 : kPanel;
    for (int64_t row0 = 0; row0 < padded_k; row0 += depth) {
      T* target = packed + row0 * kPanel;
      for (int step = 0; step < depth; ++step) {
        const int64_t row = row0 + step;
        const Source* from = source + row * row_stride + column0 * column_stride;
        const bool inside = row < k;
        if (inside && column_stride == 1 && columns == kPanel && depth == 1) {
          for (int v = 0; v < kPanelVectors; ++v) store(target + v * kLanes, load(from + v * kLanes));
          continue;
        }
        for (int64_t column = 0; column < kPanel; ++column) {
          const float value = inside && column < columns ? widen(from[column * column_stride]) : 0.0f;
          narrow(value, target + column * depth + step);
        }
      }
    }
    packed += padded_k * kPanel;
  }
}

#if defined(__AVX512BF16__)
// bfloat16 to bfloat16 moves bits: no conversion, and pairs travel as one 32-bit unit.
PYKERN_INLINE void pack(bf16* packed, const bf16* source, int64_t k, int64_t n, int64_t row_stride,
                        int64_t column_stride) {
  const int64_t padded_k = round_up(k, 2);
  for (int64_t column0 = 0; column0 < n; column0 += kPanel) {
    const int64_t columns = n - column0 < kPanel ? n - column0 : kPanel;
    for (int64_t row = 0; row < padded_k; row += 2) {
      uint32_t* target = reinterpret_cast<uint32_t*>(packed + row * kPanel);
      const bf16* even = source + row * row_stride + column0 * column_stride;
      const bf16* odd = even + row_stride;
      const bool has_odd = row + 1 < k;
      if (column_stride == 1 && columns == kPanel && has_odd) {
        for (int v = 0; v < kPanel; v += 16) {
          const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + v)));
          const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + v)));
          _mm512_storeu_si512(target + v, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
      } else if (row_stride == 1 && has_odd) {
        for (int64_t column = 0; column < columns; ++column) {
          std::memcpy(target + column, even + column * column_stride, 4);
        }
        for (int64_t column = columns; column < kPanel; ++column) target[column] = 0;
      } else {
        for (int64_t column = 0; column < kPanel; ++column) {
          uint32_t pair = 0;
          if (column < columns) {
            pair = even[column * column_stride].bits;
            if (has_odd) pair |= static_cast<uint32_t>(odd[column * column_stride].bits) << 16;
          }
          target[column] = pair;
        }
      }
    }
    packed += padded_k * kPanel;
  }
}
#endif

// Copies a row-major tile of `rows` x `columns`, converting; columns up to `stride` become zero, so
// an odd k may be rounded up.
template <class T, class Source>
void convert_rows(T* target, int64_t stride, const Source* source, int64_t source_stride, int64_t rows,
                  int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    T* to = target + row * stride;
    const Source* from = source + row * source_stride;
    int64_t column = 0;
    for (; column + kLanes <= columns; column += kLanes) store(to + column, load(from + column));
    for (; column < columns; ++column) narrow(widen(from[column]), to + column);
    for (; column < stride; ++column) narrow(0.0f, to + column);
  }
}

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
      _mm512_storeu_ps(target, accumulate ? _mm512_add_ps(_mm512_loadu_ps(target), sum[row][v]) : sum[row][v]);
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
  // Deep products run in slices, so that a slice of one panel stays in the first-level cache. Each slice
  // is summed from zero before it joins C: rounding errors grow with the slice and the number of slices.
  constexpr int64_t kSlice = 512 / sizeof(T);
  const int64_t padded_k = round_up(k, kDepth<T>);
  if (padded_k == 0 && !accumulate) {
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t column = 0; column < round_up(n, kPanel); ++column) c[row * c_row + column] = 0.0f;
    }
  }
#if defined(__AMX_BF16__)
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
