// The vector and matrix floor of one instruction-set level as plain functions, for test_*.py.
// Types are numbered as in DataType.
#include "common/matmul.h"
#include "common/scratch.cpp"
#include "common/tile_check.h"

#if defined(PYKERN_TILE_TWIN)
#include "common/tile_check.simd.cpp"
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace pykern;
using namespace pykern::PYKERN_SIMD;

namespace {

template <class T>
void widen_all(const T* source, float* vector, float* scalar, int64_t count) {
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) store(vector + i, load(source + i));
  for (int64_t i = 0; i < count; ++i) scalar[i] = widen(source[i]);
}

template <class T>
void narrow_all(const float* source, T* vector, T* scalar, int64_t count) {
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) store(vector + i, load(source + i));
  for (int64_t i = 0; i < count; ++i) narrow(source[i], scalar + i);
}

template <class T>
void copy_partial(const T* source, T* target, int64_t count) {
  store_partial(target, load_partial(source, count), count);
}

template <class Source>
void product(int64_t m, int64_t n, int64_t k, const Source* a, int64_t a_row, const Source* b, int64_t b_row,
             int64_t b_column, float* c, int64_t c_row, bool accumulate) {
  using T = compute_t<Source>;
  const int64_t padded_k = round_up(k, kDepth<T>);
  const Scratch left(m * padded_k * sizeof(T)), right(packed_size<T>(k, n) * sizeof(T));
  convert_rows(left.get<T>(), padded_k, a, a_row, m, k);
  std::memset(right.get<char>(), 0xff, packed_size<T>(k, n) * sizeof(T));  // NaN where pack writes nothing
  pack(right.get<T>(), b, k, n, b_row, b_column);
  matmul(m, n, k, left.get<T>(), padded_k, 1, right.get<T>(), c, c_row, accumulate);
}

}  // namespace

EXPORT int lanes() { return kLanes; }
EXPORT int panel() { return kPanel; }
EXPORT bool compute_is_narrow() { return sizeof(compute_t<bf16>) == 2; }

EXPORT void exp_all(const float* source, float* target, int64_t count) {
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) store(target + i, PYKERN_SIMD::exp(load(source + i)));
}

EXPORT void reduce(const float* source, float* sum, float* max) {
  *sum = sum_lanes(load(source));
  *max = max_lanes(load(source));
}

EXPORT void widen_type(int type, const void* source, float* vector, float* scalar, int64_t count) {
  if (type == 2) widen_all(static_cast<const bf16*>(source), vector, scalar, count);
  if (type == 3) widen_all(static_cast<const f16*>(source), vector, scalar, count);
}

EXPORT void narrow_type(int type, const float* source, void* vector, void* scalar, int64_t count) {
  if (type == 2) narrow_all(source, static_cast<bf16*>(vector), static_cast<bf16*>(scalar), count);
  if (type == 3) narrow_all(source, static_cast<f16*>(vector), static_cast<f16*>(scalar), count);
}

EXPORT void partial(int type, const void* source, void* target, int64_t count) {
  if (type == 0) copy_partial(static_cast<const float*>(source), static_cast<float*>(target), count);
  if (type == 2) copy_partial(static_cast<const bf16*>(source), static_cast<bf16*>(target), count);
  if (type == 3) copy_partial(static_cast<const f16*>(source), static_cast<f16*>(target), count);
}

EXPORT void multiply(int type, int64_t m, int64_t n, int64_t k, const void* a, int64_t a_row, const void* b,
                     int64_t b_row, int64_t b_column, float* c, int64_t c_row, bool accumulate) {
  const auto run = [&](auto source) {
    using T = decltype(source);
    product(m, n, k, static_cast<const T*>(a), a_row, static_cast<const T*>(b), b_row, b_column, c, c_row, accumulate);
  };
  if (type == 0) run(float());
  if (type == 2) run(bf16());
  if (type == 3) run(f16());
}

// A in place, by both of its strides.
EXPORT void multiply_strided(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_column,
                             const float* b, float* c, int64_t c_row) {
  const Scratch right(packed_size<float>(k, n) * sizeof(float));
  pack(right.get<float>(), b, k, n, n, 1);
  matmul(m, n, k, a, a_row, a_column, right.get<float>(), c, c_row, false);
}

// Packs to bfloat16 pairs, whatever the level computes in.
EXPORT int64_t pack_pairs(int type, const void* source, int64_t k, int64_t n, int64_t row, int64_t column,
                          void* packed) {
  if (packed) {
    if (type == 0) pack(static_cast<bf16*>(packed), static_cast<const float*>(source), k, n, row, column);
    if (type == 2) pack(static_cast<bf16*>(packed), static_cast<const bf16*>(source), k, n, row, column);
    if (type == 3) pack(static_cast<bf16*>(packed), static_cast<const f16*>(source), k, n, row, column);
  }
  return packed_size<bf16>(k, n);
}

#if defined(PYKERN_TILE_TWIN)
EXPORT void tile_multiply(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t a_row, const bf16* packed,
                          int64_t panel, float* c, int64_t c_row, bool accumulate) {
  amx_matmul(m, n, k, a, a_row, packed, panel, c, c_row, accumulate);
}
EXPORT bool tile_self_check() { return PYKERN_SIMD::tiles_work(); }
#endif
