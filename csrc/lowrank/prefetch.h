// Products that fetch what comes after them. Include from *.simd.cpp files only.
#pragma once

#include "common/matmul.h"
#include "common/vector_part.h"

namespace pykern::PYKERN_SIMD {

#if defined(PYKERN_SIMD_IS_amx)
constexpr int64_t kGroup = 32;  // rows of a product between two steps of a prefetch
#else
constexpr int64_t kGroup = 12;
#endif
template <class C>
constexpr int64_t kSlice = 512 / sizeof(C);  // a panel of so much depth stays in the first-level cache

// A matrix on its way into the second-level cache, a few cache lines at a time between products: asked for all at once
// they would hold up the products as long as the memory takes.
class Prefetch {
 public:
  Prefetch() = default;
  // `rows` rows of `bytes`, each `stride` bytes from the next, to be asked for in `steps` steps.
  Prefetch(const void* base, int64_t rows, int64_t stride, int64_t bytes, int64_t steps)
      : row_(static_cast<const char*>(base)),
        rows_(bytes > 0 ? rows : 0),
        stride_(stride),
        bytes_(bytes),
        share_(ceil_div(rows_ * ceil_div(bytes, 64), steps > 0 ? steps : 1)) {}

  PYKERN_INLINE void step() {
    for (int64_t i = 0; i < share_ && rows_ > 0; ++i) {
      __builtin_prefetch(row_ + offset_, 0, 2);
      offset_ += 64;
      if (offset_ >= bytes_) {
        offset_ = 0;
        row_ += stride_;
        --rows_;
      }
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t rows_ = 0, stride_ = 0, bytes_ = 0, share_ = 0, offset_ = 0;
};

// The sums that the next group of rows adds to, into the first-level cache.
PYKERN_INLINE void prefetch_sums(const float* sums, int64_t stride, int64_t rows) {
  for (int64_t row = 0; row < lesser(kGroup, rows); ++row) {
    for (int64_t line = 0; line < kPanel; line += 16) __builtin_prefetch(sums + row * stride + line, 1, 3);
  }
}

// Steps of a prefetch in a product with one panel.
template <class C>
PYKERN_INLINE int64_t panel_steps(int64_t rows, int64_t depth) {
  return ceil_div(rows, kGroup) * ceil_div(depth, kSlice<C>);
}

// product [rows, kPanel] (+)= left [rows, depth] times one panel of a packed B; `between` is called panel_steps times.
template <class C, class Between>
PYKERN_INLINE void multiply_panel(const C* left, int64_t left_stride, int64_t rows, int64_t depth, const C* panel,
                                  float* product, int64_t stride, bool accumulate, const Between& between) {
  int64_t k = 0;
  do {  // without depth the product is zero
    const bool adds = accumulate || k > 0;
    for (int64_t row = 0; row < rows; row += kGroup) {
      between();
      if (adds) prefetch_sums(product + (row + kGroup) * stride, stride, rows - row - kGroup);
      matmul(lesser(kGroup, rows - row), kPanel, lesser(kSlice<C>, depth - k), left + row * left_stride + k,
             left_stride, int64_t{1}, panel + k * kPanel, product + row * stride, stride, adds);
    }
    k += kSlice<C>;
  } while (k < depth);
}

}  // namespace pykern::PYKERN_SIMD
