// Adam in the subspace alone, on float32 moments or on 8-bit block-wise ones.
#include "common/parallel.h"
#include "kernels/lowrank/dynamic_map.h"
#include "lowrank/adam.h"
#include "lowrank/step.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::DynamicMap;
using lowrank::kQuantBlock;
using lowrank::PhaseStep;

PYKERN_INLINE vfloat magnitude(vfloat value) { return (vfloat)((vint)value & 0x7fffffff); }

// The numbers of the values nearest to x >= 0, counted from zero's; NaN counts as zero.
PYKERN_INLINE vint nearest(const DynamicMap& map, int one, vfloat x) {
  vfloat slope = broadcast(map.levels[0].slope), offset = broadcast(map.levels[0].offset);
  vfloat last = broadcast(static_cast<float>(map.levels[0].last));
  vint first = broadcast(map.levels[0].first);
  for (int level = 1; level < lowrank::kLevels; ++level) {
    const vint inside = x >= broadcast(map.levels[level].begin);
    slope = select(inside, broadcast(map.levels[level].slope), slope);
    offset = select(inside, broadcast(map.levels[level].offset), offset);
    last = select(inside, broadcast(static_cast<float>(map.levels[level].last)), last);
    first = inside ? broadcast(map.levels[level].first) : first;
  }
  vfloat cell = x * slope + offset;
  cell = cell > zero() ? cell : zero();
  cell = cell < last ? cell : last;
  vint number = first + __builtin_convertvector(cell, vint);
  number = x >= broadcast(map.smallest) ? number : broadcast(0);
  return x >= broadcast(map.top) ? broadcast(one) : number;
}

// Codes and scale of a block's first `count` values; behind them there are zeros.
void quantise(const float* values, int64_t count, const DynamicMap& map, uint8_t* codes, float* scale) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = lowrank::larger(__builtin_fabsf(values[i]), largest);
  *scale = largest < lowrank::kSmallestScale ? 0.0f : largest;
  const float reciprocal = lowrank::reciprocal_scale(largest);
  const int zero_code = map.is_signed ? 127 : 0;
  alignas(64) int32_t chosen[kQuantBlock];
  for (int64_t i = 0; i < count; i += kLanes) {
    const vfloat value = load(values + i);
    const vint number = nearest(map, 255 - zero_code, magnitude(value) * reciprocal);
    // There is no minus one: its nearest value is the last cell's.
    const vint below = number < zero_code ? zero_code - number : broadcast(0);
    const vint negative = map.is_signed ? (vint)(value < zero()) : broadcast(0);
    const vint code = negative ? below : number + zero_code;
    std::memcpy(chosen + i, &code, sizeof code);
  }
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(chosen[i]);
}

template <class T>
void quantised_block(const PhaseStep& step, const Adam& adam, vfloat factor, int64_t block) {
  const int64_t blocks = lowrank::quant_blocks(step.length), row = block / blocks;
  const int64_t begin = (block - row * blocks) * kQuantBlock, base = row * step.length + begin;
  const int64_t count = lesser(kQuantBlock, step.length - begin);
  const T* low = static_cast<const T*>(step.low) + base;
  T* direction = static_cast<T*>(step.direction) + base;
  uint8_t* first_codes = static_cast<uint8_t*>(step.exp_avg) + base;
  uint8_t* second_codes = static_cast<uint8_t*>(step.exp_avg_sq) + base;
  alignas(64) float first[kQuantBlock] = {}, second[kQuantBlock] = {};
  for (int64_t i = 0; i < count; ++i) {
    first[i] = lowrank::kSignedMap.values[first_codes[i]] * step.exp_avg_scale[block];
    second[i] = lowrank::kUnsignedMap.values[second_codes[i]] * step.exp_avg_sq_scale[block];
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t rest = lesser(kLanes, count - i);
    const vfloat gradient = rest == kLanes ? load(low + i) : load_partial(low + i, rest);
    const Moments moments = adam.advance(gradient * adam.sign, {load(first + i), load(second + i)});
    store(first + i, moments.first);
    store(second + i, moments.second);
    const vfloat value = adam.direction(moments) * factor;
    if (rest == kLanes) {
      store(direction + i, value);
    } else {
      store_partial(direction + i, value, rest);
    }
  }
  quantise(first, count, lowrank::kSignedMap, first_codes, step.exp_avg_scale + block);
  quantise(second, count, lowrank::kUnsignedMap, second_codes, step.exp_avg_sq_scale + block);
}

template <class T>
void float_chunk(const PhaseStep& step, const Adam& adam, vfloat factor, int64_t begin, int64_t count) {
  const T* low = static_cast<const T*>(step.low) + begin;
  T* direction = static_cast<T*>(step.direction) + begin;
  float* first = static_cast<float*>(step.exp_avg) + begin;
  float* second = static_cast<float*>(step.exp_avg_sq) + begin;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Moments moments = adam.advance(load(low + i) * adam.sign, {load(first + i), load(second + i)});
    store(first + i, moments.first);
    store(second + i, moments.second);
    store(direction + i, adam.direction(moments) * factor);
  }
  if (i < count) {
    const int64_t rest = count - i;
    const Moments moments = adam.advance(load_partial(low + i, rest) * adam.sign,
                                         {load_partial(first + i, rest), load_partial(second + i, rest)});
    store_partial(first + i, moments.first, rest);
    store_partial(second + i, moments.second, rest);
    store_partial(direction + i, adam.direction(moments) * factor, rest);
  }
}

template <class T>
void phase_typed(const PhaseStep& step) {
  const Adam adam(step.rule);
  const vfloat factor = broadcast(static_cast<float>(step.rule.step_size));
  if (step.exp_avg_scale) {
    constexpr int64_t kBlocks = 32;  // of one task
    const int64_t blocks = step.rank * lowrank::quant_blocks(step.length);
    parallel_tasks((blocks + kBlocks - 1) / kBlocks, [&](int64_t task, int) {
      const int64_t end = lesser((task + 1) * kBlocks, blocks);
      for (int64_t block = task * kBlocks; block < end; ++block) quantised_block<T>(step, adam, factor, block);
    });
    return;
  }
  constexpr int64_t kChunk = 16384;
  parallel_tasks((step.size + kChunk - 1) / kChunk, [&](int64_t task, int) {
    float_chunk<T>(step, adam, factor, task * kChunk, lesser(kChunk, step.size - task * kChunk));
  });
}

}  // namespace

void adam_phase(const PhaseStep& step) {
  switch (step.type) {
    case DataType::f32: return phase_typed<float>(step);
    case DataType::bf16: return phase_typed<bf16>(step);
    case DataType::f16: return phase_typed<f16>(step);
    default: return;
  }
}

}  // namespace pykern::PYKERN_SIMD
