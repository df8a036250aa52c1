// Weights of 8 bits: dequantise, change, quantise with stochastic rounding in one pass. A warp owns a group.
#pragma once

#include "kernels/lowrank/affine_sm80.cuh"
#include "kernels/lowrank/int8_weights.h"
#include "kernels/lowrank/stochastic_rounding.h"

namespace pykern::lowrank {

static_assert(kGroupValues == kPhiloxShares, "a lane draws once");

struct Int8Rule {
  float shrink, step_size;
};

__device__ __forceinline__ Int8Rule rule_of(const Int8WeightParams& params) {
  const double rate = read_number(params.lr, params.lr_is_double), shrink = rate * params.weight_decay;
  const double step_size = rate * *params.step_factor * params.factor;
  return {static_cast<float>(shrink), static_cast<float>(params.decay_after ? step_size * (1 - shrink) : step_size)};
}

// One of the two neighbours of the code before it is rounded, the nearer the likelier. Compared exactly: the sum of a
// code and a random number would round.
__device__ __forceinline__ uint8_t random_code(float code, uint32_t bits) {
  const float below = floorf(code);
  return static_cast<uint8_t>(random_share(bits) < code - below ? below + 1 : below);
}

template <bool kPacks>
__global__ void __launch_bounds__(kAffineThreads) int8_weights_kernel(const __grid_constant__ Int8WeightParams params) {
  if (is_set(params.found_inf)) return;
  const Int8Rule rule = rule_of(params);
  const uint32_t step = static_cast<uint32_t>(*params.step);
  const int lane = threadIdx.x % kWarpSize;
  // In packs a lane's values are neighbours; else neighbouring lanes take neighbouring values.
  const auto place = [&](int e) { return kPacks ? lane * kGroupValues + e : e * kWarpSize + lane; };
  AffineMatrix matrix{};
  matrix.rows = params.rows;
  matrix.columns = params.columns;
  own_group(matrix, blockIdx.x, [&](const GroupPlace& group) {
    const int64_t offset = group.row * params.columns + group.first;
    const int64_t index = params.first_row * params.columns + offset;
    const float scale = params.scale[group.group], zero = params.zero[group.group];
    GroupCodes codes{};
    float values[kGroupValues] = {};
    if (kPacks) {
      if (place(0) < group.count) {
        codes = load_codes(params.codes + offset + place(0), 8);
#pragma unroll
        for (int part = 0; part < kGroupValues / 4; ++part) {
          const Pack<float> pack = load_pack<Reuse::stream>(params.update + offset + place(part * 4));
#pragma unroll
          for (int e = 0; e < 4; ++e) values[part * 4 + e] = pack[e];
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < kGroupValues; ++e) {
        if (place(e) < group.count) {
          codes.codes[e] = params.codes[offset + place(e)];
          values[e] = params.update[offset + place(e)];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kGroupValues; ++e) {
      const float weight = zero + scale * codes.codes[e];
      values[e] = weight - (rule.shrink * weight + rule.step_size * values[e]);
    }
    const AffineScale changed = scale_of_group(values, group.count, 8, place);
    if (kPacks) {
      const PhiloxBits bits = philox(params.seed, static_cast<uint64_t>(index + place(0)) / kPhiloxShares, step);
#pragma unroll
      for (int e = 0; e < kGroupValues; ++e) {
        codes.codes[e] = random_code(code_of(values[e], changed, 255.0f), bits[e]);
      }
      if (place(0) < group.count) store_codes(params.codes + offset + place(0), codes, 8);
    } else {
#pragma unroll
      for (int e = 0; e < kGroupValues; ++e) {
        const uint64_t element = static_cast<uint64_t>(index + place(e));
        const PhiloxBits bits = philox(params.seed, element / kPhiloxShares, step);
        const uint8_t code = random_code(code_of(values[e], changed, 255.0f), bits[element % kPhiloxShares]);
        if (place(e) < group.count) params.codes[offset + place(e)] = code;
      }
    }
    if (lane == 0) {
      params.scale[group.group] = changed.scale;
      params.zero[group.group] = changed.zero;
    }
  });
}

}  // namespace pykern::lowrank
