// The inner rules: moments of the low-rank gradient advance, and give a direction. Moments are float32, bfloat16, or
// 8-bit codes of kernels/lowrank/dynamic_map.h; the arithmetic is float32, and the direction is that of the moments
// before they are rounded for storage.
#include "common/parallel.h"
#include "common/scratch.h"
#include "kernels/lowrank/dynamic_map.h"
#include "lowrank/adam.h"
#include "lowrank/blocking.h"
#include "lowrank/parts.h"

namespace pykern::PYKERN_SIMD {
namespace {

using lowrank::DynamicMap;
using lowrank::InnerRule;
using lowrank::kQuantBlock;
using lowrank::MomentStorage;
using lowrank::RulePart;

// One rule in float32; its constants are rounded once.
template <InnerRule Kind>
struct Rule {
  static constexpr bool kHasSecond = Kind == InnerRule::adamw || Kind == InnerRule::adabelief;

  float beta1, rest1, beta2, rest2, first, second, eps;

  explicit Rule(const RulePart& part)
      : beta1(static_cast<float>(part.beta1)),
        rest1(static_cast<float>(1 - part.beta1)),
        beta2(static_cast<float>(part.beta2)),
        rest2(static_cast<float>(1 - part.beta2)),
        first(static_cast<float>(part.first)),
        second(static_cast<float>(part.second)),
        eps(static_cast<float>(part.eps)) {}

  // Advances the moments of `gradient` and returns the direction.
  PYKERN_INLINE vfloat advance(vfloat gradient, vfloat& m, vfloat& v) const {
    if constexpr (Kind == InnerRule::momentum) {
      m = m * beta1 + gradient;
      return m;
    } else if constexpr (Kind == InnerRule::lion) {
      const vfloat mixed = m * beta1 + gradient * rest1;
      m = m * beta2 + gradient * rest2;
      // Zero and NaN are their own signs.
      return mixed > zero() ? broadcast(1.0f) : mixed < zero() ? broadcast(-1.0f) : mixed;
    } else {
      m = m * beta1 + gradient * rest1;
      if constexpr (Kind == InnerRule::adabelief) {
        const vfloat surprise = gradient - m;
        v = v * beta2 + surprise * surprise * rest2 + eps;
      } else {
        v = v * beta2 + gradient * gradient * rest2;
      }
      return m * first / (square_root(v) * second + eps);
    }
  }
};

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

template <InnerRule Kind>
void quantised_block(const RulePart& part, const Rule<Kind>& rule, int64_t block) {
  const int64_t blocks = lowrank::quant_blocks(part.length), row = block / blocks;
  const int64_t begin = (block - row * blocks) * kQuantBlock, base = row * part.length + begin;
  const int64_t count = lesser(kQuantBlock, part.length - begin);
  const float* low = static_cast<const float*>(part.low) + base;
  float* direction = static_cast<float*>(part.direction) + base;
  uint8_t* first_codes = static_cast<uint8_t*>(part.exp_avg) + base;
  uint8_t* second_codes = rule.kHasSecond ? static_cast<uint8_t*>(part.exp_avg_sq) + base : nullptr;
  alignas(64) float first[kQuantBlock] = {}, second[kQuantBlock] = {};
  for (int64_t i = 0; i < count; ++i) first[i] = lowrank::kSignedMap.values[first_codes[i]] * part.exp_avg_scale[block];
  if constexpr (rule.kHasSecond) {
    for (int64_t i = 0; i < count; ++i) {
      second[i] = lowrank::kUnsignedMap.values[second_codes[i]] * part.exp_avg_sq_scale[block];
    }
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t rest = lesser(kLanes, count - i);
    const vfloat gradient = load_some(low + i, rest);
    vfloat m = load(first + i), v = load(second + i);
    const vfloat value = rule.advance(gradient, m, v);
    // AdaBelief adds to the second moment of nothing too: what is behind the end must stay zero.
    store_some(first + i, m, rest);
    store_some(second + i, v, rest);
    store_some(direction + i, value, rest);
  }
  quantise(first, count, lowrank::kSignedMap, first_codes, part.exp_avg_scale + block);
  if constexpr (rule.kHasSecond) {
    quantise(second, count, lowrank::kUnsignedMap, second_codes, part.exp_avg_sq_scale + block);
  }
}

template <InnerRule Kind, class M>
void float_chunk(const RulePart& part, const Rule<Kind>& rule, int64_t begin, int64_t count) {
  const float* low = static_cast<const float*>(part.low) + begin;
  float* direction = static_cast<float*>(part.direction) + begin;
  M* first = static_cast<M*>(part.exp_avg) + begin;
  M* second = rule.kHasSecond ? static_cast<M*>(part.exp_avg_sq) + begin : nullptr;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t rest = count - i;
    vfloat m = load_some(first + i, rest), v = zero();
    if constexpr (rule.kHasSecond) v = load_some(second + i, rest);
    store_some(direction + i, rule.advance(load_some(low + i, rest), m, v), rest);
    store_some(first + i, m, rest);
    if constexpr (rule.kHasSecond) store_some(second + i, v, rest);
  }
}

template <InnerRule Kind>
void run_rule(const RulePart& part) {
  const Rule<Kind> rule(part);
  if (part.storage == MomentStorage::eight_bit) {
    constexpr int64_t kBlocks = 32;  // of one task
    const int64_t blocks = part.rank * lowrank::quant_blocks(part.length);
    parallel_tasks(ceil_div(blocks, kBlocks), [&](int64_t task, int) {
      const int64_t end = lesser((task + 1) * kBlocks, blocks);
      for (int64_t block = task * kBlocks; block < end; ++block) quantised_block(part, rule, block);
    });
    return;
  }
  constexpr int64_t kChunk = 16384;
  const int64_t size = part.rank * part.length;
  parallel_tasks(ceil_div(size, kChunk), [&](int64_t task, int) {
    const int64_t begin = task * kChunk, count = lesser(kChunk, size - begin);
    if (part.storage == MomentStorage::bfloat16) {
      float_chunk<Kind, bf16>(part, rule, begin, count);
    } else {
      float_chunk<Kind, float>(part, rule, begin, count);
    }
  });
}

}  // namespace

void rule_part(const RulePart& part) {
  switch (part.rule) {
    case InnerRule::adamw: return run_rule<InnerRule::adamw>(part);
    case InnerRule::adabelief: return run_rule<InnerRule::adabelief>(part);
    case InnerRule::lion: return run_rule<InnerRule::lion>(part);
    case InnerRule::momentum: return run_rule<InnerRule::momentum>(part);
  }
}

}  // namespace pykern::PYKERN_SIMD
