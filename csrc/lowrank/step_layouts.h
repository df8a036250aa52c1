// How the low-rank steps lay out their operands and change rows of weights. Include from *.simd.cpp files only.
#pragma once

#include <type_traits>

#include "lowrank/adam.h"
#include "lowrank/prefetch.h"

namespace pykern::PYKERN_SIMD {

constexpr int64_t kDeep = 256;  // places per slice of a projection
constexpr int64_t kTall = 96;   // rows of a product at a time

// P^T as rows: target [rank, kDeep] from `count` places of P, zero up to a whole number of vectors.
template <class C, class T>
void transpose_projector(C* target, const T* projector, int64_t count, int64_t rank, int64_t stride) {
  constexpr int depth = kDepth<C>;
  int64_t k = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    // Whole cache lines of P: 32 columns, of which one unpack interleaves 4 of every 8.
    for (; k + 32 <= rank; k += 32) {
      for (int64_t place = 0; place < count; place += 32) {
        vuint low[kLanes], high[kLanes];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t row = place + 2 * lane;
          const T* from = projector + row * stride + k;
          const __m512i first = row < count ? _mm512_loadu_si512(from) : __m512i{};
          const __m512i second = row + 1 < count ? _mm512_loadu_si512(from + stride) : __m512i{};
          low[lane] = (vuint)_mm512_unpacklo_epi16(first, second);
          high[lane] = (vuint)_mm512_unpackhi_epi16(first, second);
        }
        detail::transpose<kLanes>(low);
        detail::transpose<kLanes>(high);
        C* to = target + k * kDeep + place;
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) {
          C* line = to + (row / 4 * 8 + row % 4) * kDeep;
          std::memcpy(line, &low[row], kVectorBytes);
          std::memcpy(line + 4 * kDeep, &high[row], kVectorBytes);
        }
      }
    }
  }
#endif
  for (; k < rank; k += kLanes) {
    const int64_t ranks = lesser(kLanes, rank - k);
    for (int64_t place = 0; place < count; place += kLanes * depth) {
      vuint units[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = place + lane * depth;
        const T* from = projector + row * stride + k;
        const vfloat first = detail::load_up_to(from, row < count ? ranks : 0);
        if constexpr (depth == 1) {
          units[lane] = (vuint)first;
        } else {
          const vfloat second = detail::load_up_to(from + stride, row + 1 < count ? ranks : 0);
          units[lane] = detail::bf16_bits<T>(first) | detail::bf16_bits<T>(second) << 16;
        }
      }
      detail::transpose<kLanes>(units);
      for (int64_t row = 0; row < ranks; ++row) {
        std::memcpy(target + (k + row) * kDeep + place, &units[row], kVectorBytes);
      }
    }
  }
}

// Two successive rows (one for float32) of one vector's columns, in the layout of a packed B.
template <class C>
PYKERN_INLINE void store_packed(C* target, vfloat first, vfloat second) {
  if constexpr (kDepth<C> == 1) {
    store(target, first);
  } else {
    const vuint pairs = round_to_bf16_bits(first) | round_to_bf16_bits(second) << 16;
    std::memcpy(target, &pairs, sizeof pairs);
  }
}

template <class C>
PYKERN_INLINE vfloat load_packed(const C* source, int row) {
  if constexpr (kDepth<C> == 1) {
    return load(source);
  } else {
    vuint pairs;
    std::memcpy(&pairs, source, sizeof pairs);
    return (vfloat)(row == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
}

// The squares of the rows in one vector of a packed B, added to `sum`.
template <class C>
PYKERN_INLINE vfloat add_square(const C* source, vfloat sum) {
#if defined(__AVX512BF16__)
  if constexpr (kDepth<C> == 2) {
    const __m512bh pairs = (__m512bh)_mm512_loadu_si512(source);
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, pairs, pairs);
  }
#endif
  for (int row = 0; row < kDepth<C>; ++row) {
    const vfloat value = load_packed(source, row);
    sum += value * value;
  }
  return sum;
}

// As store(), by the instruction for it; it takes what is too small for a normal float32 for zero.
template <class T>
PYKERN_INLINE void store_rounded(T* target, vfloat value) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(target, &rounded, sizeof rounded);
    return;
  }
#endif
  store(target, value);
}

// One contiguous row of W: W -= step_size * (direction + gradient * factor), each term where it is given. The
// gradient's elements lie `stride` apart; the factor is one for the row or one for each element.
template <class T>
void update_row(const WeightUpdate& update, T* weights, const float* direction, const T* gradient, int64_t stride,
                vfloat factor, const float* factors, int64_t count) {
  T gathered[kLanes] = {};
  const auto change = [&](int64_t i, int64_t lanes) {
    vfloat value = direction ? load(direction + i) : zero();
    if (gradient) {
      const T* from = gradient + i;
      if (stride != 1) {
        for (int64_t lane = 0; lane < lanes; ++lane) gathered[lane] = gradient[(i + lane) * stride];
        from = gathered;
      }
      const vfloat slope = lanes == kLanes ? load(from) : load_partial(from, lanes);
      value += slope * (factors ? load(factors + i) : factor);
    }
    return value;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_rounded(weights + i, update.apply(load(weights + i), change(i, kLanes)));
  }
  if (i < count) {
    const vfloat value = update.apply(load_partial(weights + i, count - i), change(i, count - i));
    store_partial(weights + i, value, count - i);
  }
}

}  // namespace pykern::PYKERN_SIMD
