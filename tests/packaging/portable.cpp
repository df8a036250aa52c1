// The portable level as a program, for a processor that this machine is not: prints what is wrong.
#include <cmath>
#include <cstdio>

#include "../common/floor.cpp"

namespace {

int wrong_products() {
  int wrong = 0;
  static float a[64 * 64], b[64 * 64], c[64 * 64];
  static bf16 narrow_a[64 * 64], narrow_b[64 * 64];
  for (int m = 1; m < 40; m += 3) {
    for (int n = 1; n < 40; n += 5) {
      for (int k = 1; k < 50; k += 7) {
        for (int i = 0; i < m * k; ++i) narrow(a[i] = i * 7 % 9 - 4, narrow_a + i);
        for (int i = 0; i < k * n; ++i) narrow(b[i] = i * 5 % 7 - 3, narrow_b + i);
        for (int way = 0; way < 3; ++way) {
          // B by rows, B by columns, bfloat16.
          const int64_t row = way == 1 ? 1 : n, column = way == 1 ? k : 1;
          if (way == 2) {
            multiply(2, m, n, k, narrow_a, k, narrow_b, row, column, c, 64, false);
          } else {
            multiply(0, m, n, k, a, k, b, row, column, c, 64, false);
          }
          for (int i = 0; i < m; ++i) {
            for (int j = 0; j < n; ++j) {
              float sum = 0;
              for (int step = 0; step < k; ++step) sum += a[i * k + step] * b[step * row + j * column];
              wrong += c[i * 64 + j] != sum;
            }
          }
        }
      }
    }
  }
  return wrong;
}

int wrong_halves() {
  int wrong = 0;
  for (int bits = 0; bits < 65536; ++bits) {
    const f16 half{static_cast<uint16_t>(bits)};
    const bf16 brain{static_cast<uint16_t>(bits)};
    f16 half_back;
    bf16 brain_back;
    narrow(widen(half), &half_back);
    narrow(widen(brain), &brain_back);
    wrong += widen(half) == widen(half) && half_back.bits != bits;
    wrong += widen(brain) == widen(brain) && brain_back.bits != bits;
  }
  return wrong;
}

int wrong_exponentials() {
  int wrong = 0;
  float in[kLanes], out[kLanes];
  for (double x = -87; x < 88; x += 0.00371) {
    for (float& value : in) value = static_cast<float>(x);
    exp_all(in, out, kLanes);
    const double exact = std::exp(static_cast<double>(in[0]));
    int exponent;
    std::frexp(exact, &exponent);
    wrong += std::fabs(out[0] - exact) > 1.5 * std::ldexp(1.0, exponent - 24);
  }
  return wrong;
}

}  // namespace

int main() {
  const int products = wrong_products(), halves = wrong_halves(), exponentials = wrong_exponentials();
  std::printf("%d products, %d halves, %d exponentials\n", products, halves, exponentials);
  return products + halves + exponentials != 0 || !PYKERN_SIMD::tiles_work();
}
