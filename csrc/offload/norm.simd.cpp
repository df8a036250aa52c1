#include "offload/norm.h"

#include <cstring>

#include "common/scratch.h"
#include "common/vector_part.h"

namespace pykern::PYKERN_SIMD {
namespace {

PYKERN_INLINE float root(float value) { return __builtin_sqrtf(value); }

PYKERN_INLINE vfloat first_lanes(vfloat value, int64_t count) {
  if (count >= kLanes) return value;
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return select(lane < broadcast(static_cast<int32_t>(count)), value, zero());
}

// Visits a row vector by vector: (column, elements).
template <class Visit>
PYKERN_INLINE void for_columns(int64_t columns, const Visit& visit) {
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) visit(column, int64_t{kLanes});
  if (column < columns) visit(column, columns - column);
}

// In four sums, so that additions don't wait for each other.
template <class Term>
PYKERN_INLINE float sum_columns(int64_t columns, const Term& term) {
  vfloat sums[4] = {};
  int64_t column = 0;
  for (; column + 4 * kLanes <= columns; column += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sums[i] += term(column + i * kLanes, int64_t{kLanes});
  }
  for_columns(columns - column, [&](int64_t more, int64_t count) { sums[0] += term(column + more, count); });
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
PYKERN_INLINE vfloat load_or(const void* source, int64_t column, int64_t count, float otherwise) {
  return source ? load_some(static_cast<const T*>(source) + column, count) : broadcast(otherwise);
}

template <class T>
void rows_of(const NormParams& p, int64_t begin, int64_t end) {
  const int64_t columns = p.columns;
  const float inverse = 1.0f / static_cast<float>(columns);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * columns;
    T* y = static_cast<T*>(p.y) + row * columns;
    float mean = 0;
    if (p.mean) {
      const auto term = [&](int64_t column, int64_t count) { return load_some(x + column, count); };
      mean = p.mean[row] = sum_columns(columns, term) * inverse;
    }
    const float squares = sum_columns(columns, [&](int64_t column, int64_t count) {
      const vfloat centred = first_lanes(load_some(x + column, count) - mean, count);
      return centred * centred;
    });
    const float rstd = 1.0f / root(squares * inverse + p.eps);
    p.rstd[row] = rstd;
    for_columns(columns, [&](int64_t column, int64_t count) {
      const vfloat normal = (load_some(x + column, count) - mean) * rstd;
      const vfloat weight = load_or<T>(p.weight, column, count, 1.0f), bias = load_or<T>(p.bias, column, count, 0.0f);
      store_some(y + column, normal * weight + bias, count);
    });
  }
}

template <class T>
void backward_rows_of(const NormBackwardParams& p, int64_t begin, int64_t end, float* sums, int64_t stride) {
  const int64_t columns = p.columns;
  const float inverse = 1.0f / static_cast<float>(columns);
  float* weight_sums = p.grad_weight ? sums : nullptr;
  float* bias_sums = p.grad_bias ? sums + (weight_sums ? stride : 0) : nullptr;
  const int64_t wanted = (weight_sums ? 1 : 0) + (bias_sums ? 1 : 0);
  if (wanted > 0) std::memset(sums, 0, static_cast<size_t>(wanted * stride) * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * columns;
    const T* grad = static_cast<const T*>(p.grad) + row * columns;
    T* grad_x = static_cast<T*>(p.grad_x) + row * columns;
    const float mean = p.mean ? p.mean[row] : 0.0f, rstd = p.rstd[row];
    const auto normal_at = [&](int64_t column, int64_t count) {
      return (load_some(x + column, count) - mean) * rstd;
    };
    float plain = 0;
    if (p.mean) {
      plain = inverse * sum_columns(columns, [&](int64_t column, int64_t count) {
                return load_some(grad + column, count) * load_or<T>(p.weight, column, count, 1.0f);
              });
    }
    // The gradient's lanes behind the row's end are zero, and with them every product.
    const float along = inverse * sum_columns(columns, [&](int64_t column, int64_t count) {
                          const vfloat normal = normal_at(column, count), g = load_some(grad + column, count);
                          if (weight_sums) store(weight_sums + column, load(weight_sums + column) + g * normal);
                          if (bias_sums) store(bias_sums + column, load(bias_sums + column) + g);
                          return g * load_or<T>(p.weight, column, count, 1.0f) * normal;
                        });
    for_columns(columns, [&](int64_t column, int64_t count) {
      const vfloat weighted = load_some(grad + column, count) * load_or<T>(p.weight, column, count, 1.0f);
      store_some(grad_x + column, rstd * (weighted - plain - normal_at(column, count) * along), count);
    });
  }
}

template <class T>
void sum_parts_of(const float* parts, int64_t count, int64_t stride, int64_t columns, T* target) {
  for_columns(columns, [&](int64_t column, int64_t lanes) {
    vfloat sum = zero();
    for (int64_t part = 0; part < count; ++part) sum += load(parts + part * stride + column);
    store_some(target + column, sum, lanes);
  });
}

}  // namespace

void norm_rows(DataType type, const NormParams& params, int64_t begin, int64_t end) {
  if (type == DataType::f32) return rows_of<float>(params, begin, end);
  if (type == DataType::bf16) return rows_of<bf16>(params, begin, end);
  rows_of<f16>(params, begin, end);
}

void norm_backward_rows(DataType type, const NormBackwardParams& params, int64_t begin, int64_t end, float* sums,
                        int64_t stride) {
  if (type == DataType::f32) return backward_rows_of<float>(params, begin, end, sums, stride);
  if (type == DataType::bf16) return backward_rows_of<bf16>(params, begin, end, sums, stride);
  backward_rows_of<f16>(params, begin, end, sums, stride);
}

void norm_sum_parts(DataType type, const float* parts, int64_t count, int64_t stride, int64_t columns, void* target) {
  if (type == DataType::f32) return sum_parts_of(parts, count, stride, columns, static_cast<float*>(target));
  if (type == DataType::bf16) return sum_parts_of(parts, count, stride, columns, static_cast<bf16*>(target));
  sum_parts_of(parts, count, stride, columns, static_cast<f16*>(target));
}

}  // namespace pykern::PYKERN_SIMD
