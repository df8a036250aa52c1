// The step of weights that are kept in 8 bits: tiles of a few rows by kWide columns, each dequantised, changed and
// quantised anew while it is in cache.
#include "common/parallel.h"
#include "kernels/common/philox.h"
#include "kernels/lowrank/int8_weights.h"
#include "lowrank/affine.h"
#include "lowrank/blocking.h"
#include "lowrank/quantized.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::Factor;
using lowrank::Int8Step;

constexpr int64_t kTall = 48;
constexpr int64_t kWide = 512;
static_assert(kWide % kAffineGroup == 0 && kWide % kPanel == 0);

template <class Body>
void with_type(DataType type, const void* values, const Body& body) {
  switch (type) {
    case DataType::bf16: return body(static_cast<const bf16*>(values));
    case DataType::f16: return body(static_cast<const f16*>(values));
    default: return body(static_cast<const float*>(values));
  }
}

// Rows of the left factor in the layout that the product wants; columns up to `stride` become zero.
template <class C>
void convert_left(C* target, int64_t stride, const Factor& left, int64_t first_row, int64_t rows, int64_t rank) {
  with_type(left.type, left.values, [&](auto values) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto* from = values + (first_row + row) * left.row_stride;
      for (int64_t k = 0; k < rank; ++k) narrow(widen(from[k * left.column_stride]), target + row * stride + k);
      for (int64_t k = rank; k < stride; ++k) narrow(0.0f, target + row * stride + k);
    }
  });
}

// Random numbers of `count` elements from number `index` on.
void random_numbers(float* target, uint64_t seed, uint64_t index, uint32_t step, int64_t count) {
  constexpr int64_t kShares = kPhiloxShares;
  const int64_t skipped = static_cast<int64_t>(index % kShares), draws = (skipped + count + kShares - 1) / kShares;
  float numbers[kAffineGroup + 2 * kShares];
  for (int64_t i = 0; i < draws; ++i) {
    const PhiloxBits bits = philox(seed, index / kShares + static_cast<uint64_t>(i), step);
    for (int share = 0; share < kShares; ++share) numbers[i * kShares + share] = lowrank::random_share(bits[share]);
  }
  std::memcpy(target, numbers + skipped, static_cast<size_t>(count) * sizeof(float));
}

// One group: `update` has the product, and room for whole vectors.
void step_group(const Int8Step& step, int64_t row, int64_t first, int64_t count, const float* update) {
  const int64_t place = row * lowrank::affine_groups(step.columns) + first / kAffineGroup;
  uint8_t* codes = step.codes + row * step.columns + first;
  alignas(64) float values[kAffineGroup] = {}, random[kAffineGroup] = {};
  alignas(64) int32_t chosen[kAffineGroup];
  load_group(values, codes, count, 8, {step.scale[place], step.zero[place]});
  for (int64_t i = 0; i < count; i += kLanes) {
    const vfloat weight = load(values + i);
    store(values + i, weight - (weight * step.shrink + load(update + i) * step.step_size));
  }
  const AffineScale group = scale_of_group(values, count, 8);
  const CodeScale code(group, 8);
  random_numbers(random, step.seed, static_cast<uint64_t>(row * step.columns + first), step.step, count);
  for (int64_t i = 0; i < count; i += kLanes) {
    const vfloat exact = code(load(values + i));
    const vint below = __builtin_convertvector(exact, vint);
    // Compared exactly: the sum of a code and a random number would round.
    const vint above = load(random + i) < exact - __builtin_convertvector(below, vfloat);
    const vint rounded = below - above;
    std::memcpy(chosen + i, &rounded, sizeof rounded);
  }
  store_codes(codes, chosen, count, 8);
  step.scale[place] = group.scale;
  step.zero[place] = group.zero;
}

template <class C>
bool step_typed(const Int8Step& step) {
  const int64_t stride = round_up(step.rank, 2), depth = round_up(step.rank, kDepth<C>);
  const int64_t wide = lesser(kWide, round_up(step.columns, kPanel));
  const int64_t thread_bytes = round_up(static_cast<int64_t>(kTall * (wide * sizeof(float) + stride * sizeof(C))), 64);
  const Scratch packed(static_cast<size_t>(packed_size<C>(step.rank, step.columns)) * sizeof(C));
  const Scratch tiles(static_cast<size_t>(thread_bytes * max_threads()));
  if (!packed.get<C>() || !tiles.get<char>()) return false;
  parallel_tasks(ceil_div(step.columns, kWide), [&](int64_t task, int) {
    const int64_t first = task * kWide, columns = lesser(kWide, step.columns - first);
    with_type(step.right.type, step.right.values, [&](auto values) {
      pack(packed.get<C>() + first * depth, values + first * step.right.column_stride, step.rank, columns,
           step.right.row_stride, step.right.column_stride);
    });
  });
  parallel_tasks(ceil_div(step.rows, kTall), [&](int64_t task, int thread) {
    const int64_t first_row = task * kTall, rows = lesser(kTall, step.rows - first_row);
    float* update = reinterpret_cast<float*>(tiles.get<char>() + thread * thread_bytes);
    C* left = reinterpret_cast<C*>(update + kTall * wide);
    convert_left(left, stride, step.left, first_row, rows, step.rank);
    for (int64_t first = 0; first < step.columns; first += kWide) {
      const int64_t columns = lesser(kWide, step.columns - first);
      matmul(rows, columns, step.rank, left, stride, int64_t{1}, packed.get<C>() + first * depth, update, wide, false);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t group = 0; group < columns; group += kAffineGroup) {
          step_group(step, first_row + row, first + group, lesser(kAffineGroup, columns - group),
                     update + row * wide + group);
        }
      }
    }
  });
  return true;
}

}  // namespace

bool int8_weights_step(const Int8Step& step) {
  return step.narrow_products ? step_typed<compute_t<bf16>>(step) : step_typed<float>(step);
}

}  // namespace pykern::PYKERN_SIMD
