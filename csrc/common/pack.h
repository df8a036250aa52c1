// Operand layouts of the products in matmul.h. Include from *.simd.cpp files only.
//
// A packed B is a row of panels, each kPanel columns wide and all of k deep; in a panel,
// `kDepth<T>` successive rows of one column lie side by side, which is the operand layout of both
// the AVX-512 and the AMX bfloat16 dot product. Columns past n and rows past k are zero.
#pragma once

#include <type_traits>

#include "common/numeric.h"
#include "common/scratch.h"
#include "common/vector.h"

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

template <class T>
constexpr int kDepth = 1;
template <>
inline constexpr int kDepth<bf16> = 2;

// Elements of a packed B.
template <class T>
PYKERN_INLINE int64_t packed_size(int64_t k, int64_t n) {
  return round_up(k, kDepth<T>) * round_up(n, kPanel);
}

namespace detail {

// `count` elements, which may be none or more than a vector holds; the lanes past them are zero.
template <class Source>
PYKERN_INLINE vfloat load_up_to(const Source* source, int64_t count) {
  if (count >= kLanes) return load(source);
  return count > 0 ? load_partial(source, count) : zero();
}

// Values as bfloat16 in the low half of each lane. What was widened from bfloat16 is not rounded.
template <class Source>
PYKERN_INLINE vuint bf16_bits(vfloat value) {
  if constexpr (std::is_same_v<Source, bf16>) {
    return (vuint)value >> 16;
  } else {
    return round_to_bf16_bits(value);
  }
}

// kLanes units of successive elements in memory; a unit is kDepth<T> elements converted to T.
template <class T, class Source>
PYKERN_INLINE vuint load_units(const Source* source) {
  vuint units;
  if constexpr (std::is_same_v<T, float>) {
    units = (vuint)load(source);
  } else if constexpr (std::is_same_v<T, Source>) {
    std::memcpy(&units, source, sizeof units);
  } else {
    T pairs[2 * kLanes];
    store(pairs, load(source));
    store(pairs + kLanes, load(source + kLanes));
    std::memcpy(&units, pairs, sizeof units);
  }
  return units;
}

template <class T, class Source>
PYKERN_INLINE vuint load_units_partial(const Source* source, int64_t elements) {
  if constexpr (kDepth<T> == 1) return (vuint)load_up_to(source, elements);
  Source buffer[kLanes * kDepth<T>] = {};
  std::memcpy(buffer, source, elements * sizeof(Source));
  return load_units<T>(buffer);
}

template <int... Lane>
struct Lanes {};
template <int Count, int... Lane>
struct CountLanes : CountLanes<Count - 1, Count - 1, Lane...> {};
template <int... Lane>
struct CountLanes<0, Lane...> {
  using type = Lanes<Lane...>;
};

// a0 b0 a1 b1 ...: the lower and the upper half of the two vectors interleaved.
template <int... Lane>
PYKERN_INLINE void interleave(vuint a, vuint b, vuint& low, vuint& high, Lanes<Lane...>) {
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * kLanes)...);
  high = __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * kLanes + kLanes / 2)...);
#else
  low = __builtin_shuffle(a, b, vuint{(Lane / 2 + Lane % 2 * kLanes)...});
  high = __builtin_shuffle(a, b, vuint{(Lane / 2 + Lane % 2 * kLanes + kLanes / 2)...});
#endif
}

// One round turns element (row, column) so that the top bit of each index becomes the lowest bit
// of the other; as many rounds as an index has bits make a transpose.
template <int Round>
PYKERN_INLINE void transpose(vuint (&rows)[kLanes]) {
  if constexpr (Round > 1) {
    vuint turned[kLanes];
#pragma GCC unroll 16
    for (int row = 0; row < kLanes / 2; ++row) {
      interleave(rows[row], rows[row + kLanes / 2], turned[2 * row], turned[2 * row + 1],
                 typename CountLanes<kLanes>::type());
    }
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) rows[row] = turned[row];
    transpose<Round / 2>(rows);
  }
}

#if defined(__AVX512F__)
// The same by unpacks and moves of quarters: they need no index registers, so nothing spills.
template <>
PYKERN_INLINE void transpose<16>(vuint (&rows)[kLanes]) {
  __m512i quads[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i low01 = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    const __m512i high01 = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    const __m512i low23 = _mm512_unpacklo_epi32((__m512i)rows[i + 2], (__m512i)rows[i + 3]);
    const __m512i high23 = _mm512_unpackhi_epi32((__m512i)rows[i + 2], (__m512i)rows[i + 3]);
    // Quarter q of quads[i + j]: column 4 q + j of rows i to i + 3.
    quads[i] = _mm512_unpacklo_epi64(low01, low23);
    quads[i + 1] = _mm512_unpackhi_epi64(low01, low23);
    quads[i + 2] = _mm512_unpacklo_epi64(high01, high23);
    quads[i + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    rows[j] = (vuint)_mm512_shuffle_i32x4(even0, even1, 0x88);
    rows[4 + j] = (vuint)_mm512_shuffle_i32x4(odd0, odd1, 0x88);
    rows[8 + j] = (vuint)_mm512_shuffle_i32x4(even0, even1, 0xdd);
    rows[12 + j] = (vuint)_mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}
#endif

// One panel of a B whose rows are contiguous.
template <class T, class Source>
PYKERN_INLINE void pack_rows(T* panel, const Source* source, int64_t k, int64_t columns, int64_t row_stride) {
  constexpr int depth = kDepth<T>;
  for (int64_t row = 0; row < k; row += depth) {
    const Source* from = source + row * row_stride;
    T* target = panel + row * kPanel;
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t left = columns - v * kLanes;
      const vfloat first = load_up_to(from + v * kLanes, left);
      if constexpr (depth == 1) {
        store(target + v * kLanes, first);
      } else {
        const vfloat second = load_up_to(from + row_stride + v * kLanes, row + 1 < k ? left : 0);
        const vuint pairs = bf16_bits<Source>(first) | bf16_bits<Source>(second) << 16;
        std::memcpy(target + v * kLanes * depth, &pairs, sizeof pairs);
      }
    }
  }
}

// One panel of a B whose columns are contiguous: square blocks, transposed in registers.
template <class T, class Source>
PYKERN_INLINE void pack_columns(T* panel, const Source* source, int64_t k, int64_t columns, int64_t column_stride) {
  constexpr int depth = kDepth<T>;
  for (int64_t row = 0; row < k; row += kLanes * depth) {
    const int64_t rows = k - row < kLanes * depth ? k - row : kLanes * depth;
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t left = columns - v * kLanes;
      const Source* from = source + row + v * kLanes * column_stride;
      vuint units[kLanes];
      if (rows == kLanes * depth && left >= kLanes) {
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) units[lane] = load_units<T>(from + lane * column_stride);
      } else {
        for (int lane = 0; lane < kLanes; ++lane) {
          units[lane] = lane < left ? load_units_partial<T>(from + lane * column_stride, rows) : vuint{};
        }
      }
      transpose<kLanes>(units);
      T* target = panel + row * kPanel + v * kLanes * depth;
      if (rows == kLanes * depth) {
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane)
          std::memcpy(target + lane * kPanel * depth, &units[lane], kVectorBytes);
      } else {
        for (int64_t lane = 0; lane * depth < rows; ++lane) {
          std::memcpy(target + lane * kPanel * depth, &units[lane], kVectorBytes);
        }
      }
    }
  }
}

template <class T, class Source>
PYKERN_INLINE void pack_strided(T* panel, const Source* source, int64_t k, int64_t columns, int64_t row_stride,
                                int64_t column_stride) {
  constexpr int depth = kDepth<T>;
  for (int64_t row = 0; row < round_up(k, depth); ++row) {
    T* target = panel + row / depth * depth * kPanel + row % depth;
    for (int64_t column = 0; column < kPanel; ++column) {
      const bool inside = row < k && column < columns;
      narrow(inside ? widen(source[row * row_stride + column * column_stride]) : 0.0f, target + column * depth);
    }
  }
}

}  // namespace detail

// Packs B, whose element (row, column) is source[row * row_stride + column * column_stride],
// converting from its storage type. Fast where one of the strides is 1.
template <class T, class Source>
void pack(T* packed, const Source* source, int64_t k, int64_t n, int64_t row_stride, int64_t column_stride) {
  for (int64_t column = 0; column < n; column += kPanel) {
    const int64_t columns = n - column < kPanel ? n - column : kPanel;
    const Source* from = source + column * column_stride;
    if (column_stride == 1) {
      detail::pack_rows(packed, from, k, columns, row_stride);
    } else if (row_stride == 1) {
      detail::pack_columns(packed, from, k, columns, column_stride);
    } else {
      detail::pack_strided(packed, from, k, columns, row_stride, column_stride);
    }
    packed += round_up(k, kDepth<T>) * kPanel;
  }
}

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
    if (column < columns) store_partial(to + column, load_partial(from + column, columns - column), columns - column);
    for (column = columns; column < stride; ++column) narrow(0.0f, to + column);
  }
}

}  // namespace pykern::PYKERN_SIMD
