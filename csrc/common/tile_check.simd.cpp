#include "common/tile_check.h"

#if defined(PYKERN_SIMD_IS_amx) || defined(PYKERN_TILE_TWIN)
#include "common/amx.h"
#include "common/vector.h"
#endif

namespace pykern::PYKERN_SIMD {

bool tiles_work() {
#if defined(PYKERN_SIMD_IS_amx) || defined(PYKERN_TILE_TWIN)
  // Sizes that need a tail of rows and of depth; small integers, so that every sum is exact.
  constexpr int64_t m = 33, n = 64, k = 70;
  const auto left = [](int64_t row, int64_t step) { return static_cast<float>((row * 5 + step * 3) % 7 - 3); };
  const auto right = [](int64_t step, int64_t column) { return static_cast<float>((step * 2 + column * 3) % 5 - 2); };
  bf16 a[m * k], packed[k * n];
  float c[m * n];
  for (int64_t i = 0; i < m * k; ++i) narrow(left(i / k, i % k), a + i);
  for (int64_t i = 0; i < k * n; ++i) narrow(right(i / (2 * n) * 2 + i % 2, i / 2 % n), packed + i);
  amx_matmul(m, n, k, a, k, packed, n, c, n, false);
  for (int64_t i = 0; i < m * n; ++i) {
    float sum = 0;
    for (int64_t step = 0; step < k; ++step) sum += left(i / n, step) * right(step, i % n);
    if (c[i] != sum) return false;
  }
#endif
  return true;
}

}  // namespace pykern::PYKERN_SIMD
