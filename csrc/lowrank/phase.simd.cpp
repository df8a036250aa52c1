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

// Half way between the magnitudes of neighbouring codes, counted from zero's.
struct Midpoints {
  int zero, count;
  float values[lowrank::kCodes];

  constexpr explicit Midpoints(const DynamicMap& map) : zero(map.is_signed ? 127 : 0), count(255 - zero), values{} {
    for (int i = 0; i < count; ++i) {
      values[i] = static_cast<float>((static_cast<double>(map.values[zero + i]) + map.values[zero + i + 1]) / 2);
    }
  }

  // The number of the value nearest to x >= 0; NaN counts as zero.
  int nearest(float x) const {
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (x >= values[middle]) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

constexpr Midpoints kSignedMidpoints{lowrank::kSignedMap};
constexpr Midpoints kUnsignedMidpoints{lowrank::kUnsignedMap};

// Codes and scale of the first `count` values.
void quantise(const float* values, int64_t count, const Midpoints& midpoints, bool is_signed, uint8_t* codes,
              float* scale) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = lowrank::larger(__builtin_fabsf(values[i]), largest);
  *scale = largest < lowrank::kSmallestScale ? 0.0f : largest;
  const float reciprocal = lowrank::reciprocal_scale(largest);
  for (int64_t i = 0; i < count; ++i) {
    const int number = midpoints.nearest(__builtin_fabsf(values[i]) * reciprocal);
    if (is_signed && values[i] < 0) {
      // There is no minus one: its nearest value is the last cell's.
      codes[i] = static_cast<uint8_t>(midpoints.zero - (number < midpoints.zero ? number : midpoints.zero));
    } else {
      codes[i] = static_cast<uint8_t>(midpoints.zero + number);
    }
  }
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
  quantise(first, count, kSignedMidpoints, true, first_codes, step.exp_avg_scale + block);
  quantise(second, count, kUnsignedMidpoints, false, second_codes, step.exp_avg_sq_scale + block);
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
