#include "common/peak.h"

#include "common/matmul.h"
#include "common/parallel.h"

namespace pykern::PYKERN_SIMD {
namespace {

template <class T>
double repeat(int64_t repeats) {
  constexpr int64_t m = 96, n = 2 * kPanel, k = 256;
  parallel_tasks(max_threads(), [&](int64_t, int) {
    const Scratch a(m * k * sizeof(T)), b(packed_size<T>(k, n) * sizeof(T)), c(m * n * sizeof(float));
    if (!a.get<T>() || !b.get<T>() || !c.get<float>()) return;
    for (int64_t i = 0; i < m * k; ++i) narrow(static_cast<float>(i % 7) - 3.0f, a.get<T>() + i);
    for (int64_t i = 0; i < packed_size<T>(k, n); ++i) narrow(static_cast<float>(i % 5) - 2.0f, b.get<T>() + i);
    for (int64_t i = 0; i < repeats; ++i) matmul(m, n, k, a.get<T>(), k, 1, b.get<T>(), c.get<float>(), n, false);
  });
  return 2.0 * m * n * k * static_cast<double>(repeats) * max_threads();
}

}  // namespace

double matmul_in_cache(bool bfloat16, int64_t repeats) {
  return bfloat16 ? repeat<compute_t<bf16>>(repeats) : repeat<float>(repeats);
}

}  // namespace pykern::PYKERN_SIMD
