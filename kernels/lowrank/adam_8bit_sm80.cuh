// Adam in the subspace on 8-bit block-wise moments: dequantise, advance, requantise in one pass.
//
// A warp owns one block of 256 values, eight a lane, in registers from the load of its codes to the store of
// the new ones; the two new scales are reductions over its lanes.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/lowrank/adam_sm80.cuh"
#include "kernels/lowrank/dynamic_map.h"

namespace pykern::lowrank {

constexpr int kQuantThreads = 256;
constexpr int kLaneValues = kQuantBlock / kWarpSize;
constexpr int kQuantResident = 4;  // thread blocks per multiprocessor
static_assert(kLaneValues == 8, "a lane's codes are one eight-byte access");

struct QuantMaps {
  DynamicMap first, second;
};

// What the threads look up: the value of every code, and of every level its cells.
struct MapTables {
  float values[2][kCodes];
  Level levels[2][kLevels];
};

union LaneCodes {
  uint64_t bits;
  uint8_t codes[kLaneValues];
};

struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return larger(a, b); }
};

// The number of the value nearest to x >= 0, counted from zero's; NaN counts as zero.
__device__ __forceinline__ int nearest(const Level* levels, float smallest, float top, int one, float x) {
  int level = 0;
#pragma unroll
  for (int next = 1; next < kLevels; ++next) level += x >= levels[next].begin ? 1 : 0;
  const Level& found = levels[level];
  const float cell = x * found.slope + found.offset;
  const float last = static_cast<float>(found.last);
  const int number = found.first + static_cast<int>(cell > 0 ? (cell < last ? cell : last) : 0.0f);
  return x >= top ? one : x >= smallest ? number : 0;
}

template <class T, bool kPacks>
__global__ void __launch_bounds__(kQuantThreads, kQuantResident)
    adam_8bit_kernel(Adam8BitParams params, QuantMaps maps) {
  PYKERN_SHARED(MapTables, tables);
  for (int code = threadIdx.x; code < kCodes; code += kQuantThreads) {
    tables.values[0][code] = maps.first.values[code];
    tables.values[1][code] = maps.second.values[code];
  }
  if (threadIdx.x < kLevels) {
    tables.levels[0][threadIdx.x] = maps.first.levels[threadIdx.x];
    tables.levels[1][threadIdx.x] = maps.second.levels[threadIdx.x];
  }
  __syncthreads();

  constexpr int kSize = Pack<T>::kSize;
  const AdamFactors<float>& rule = params.rule->single;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row_blocks = quant_blocks(params.length), blocks = params.rank * row_blocks;
  const int64_t stride = int64_t{gridDim.x} * (kQuantThreads / kWarpSize);
  for (int64_t block = int64_t{blockIdx.x} * (kQuantThreads / kWarpSize) + threadIdx.x / kWarpSize; block < blocks;
       block += stride) {
    const int64_t row = block / row_blocks, begin = (block - row * row_blocks) * kQuantBlock;
    const int64_t rest = params.length - begin;
    const int count = rest < kQuantBlock ? static_cast<int>(rest) : kQuantBlock;
    const int64_t base = row * params.length + begin;
    const T* low = static_cast<const T*>(params.low) + base;
    T* direction = static_cast<T*>(params.direction) + base;
    // In packs a lane's values are neighbours; else neighbouring lanes take neighbouring values.
    const auto place = [&](int e) { return kPacks ? lane * kLaneValues + e : e * kWarpSize + lane; };

    LaneCodes first_codes{}, second_codes{};
    Pack<T> gradients[kLaneValues / kSize];
    if (kPacks) {
      // The length is a multiple of a lane's values: a lane has all of them or none.
      if (place(0) < count) {
        first_codes.bits = *reinterpret_cast<const uint64_t*>(params.exp_avg + base + place(0));
        second_codes.bits = *reinterpret_cast<const uint64_t*>(params.exp_avg_sq + base + place(0));
#pragma unroll
        for (int part = 0; part < kLaneValues / kSize; ++part) {
          gradients[part] = load_pack<Reuse::stream>(low + place(part * kSize));
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < kLaneValues; ++e) {
        if (place(e) < count) {
          first_codes.codes[e] = params.exp_avg[base + place(e)];
          second_codes.codes[e] = params.exp_avg_sq[base + place(e)];
          gradients[e / kSize][e % kSize] = low[place(e)];
        }
      }
    }
    const float first_scale = params.exp_avg_scale[block], second_scale = params.exp_avg_sq_scale[block];

    float first[kLaneValues], second[kLaneValues];
    float first_largest = 0, second_largest = 0;
#pragma unroll
    for (int e = 0; e < kLaneValues; ++e) {
      first[e] = second[e] = 0.0f;
      if (place(e) < count) {
        T& value = gradients[e / kSize][e % kSize];
        first[e] = tables.values[0][first_codes.codes[e]] * first_scale;
        second[e] = tables.values[1][second_codes.codes[e]] * second_scale;
        advance(rule, rule.sign * widen(value), first[e], second[e]);
        first_largest = larger(fabsf(first[e]), first_largest);
        second_largest = larger(second[e], second_largest);
        narrow(adam_direction(rule, first[e], second[e]) * rule.step_size, value);
        if (!kPacks) direction[place(e)] = value;
        if (kPacks && e % kSize == kSize - 1) {
          store_pack<Reuse::stream>(direction + place(e + 1 - kSize), gradients[e / kSize]);
        }
      }
    }
    first_largest = warp_reduce(first_largest, Larger());
    second_largest = warp_reduce(second_largest, Larger());
    const float first_reciprocal = reciprocal_scale(first_largest);
    const float second_reciprocal = reciprocal_scale(second_largest);
#pragma unroll
    for (int e = 0; e < kLaneValues; ++e) {
      const int size = nearest(tables.levels[0], maps.first.smallest, maps.first.top, 128,
                               fabsf(first[e]) * first_reciprocal);
      // There is no minus one: its nearest value is the last cell's.
      first_codes.codes[e] = static_cast<uint8_t>(first[e] < 0 ? 127 - (size < 127 ? size : 127) : 127 + size);
      second_codes.codes[e] = static_cast<uint8_t>(
          nearest(tables.levels[1], maps.second.smallest, maps.second.top, 255, second[e] * second_reciprocal));
    }
    if (kPacks) {
      if (place(0) < count) {
        *reinterpret_cast<uint64_t*>(params.exp_avg + base + place(0)) = first_codes.bits;
        *reinterpret_cast<uint64_t*>(params.exp_avg_sq + base + place(0)) = second_codes.bits;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kLaneValues; ++e) {
        if (place(e) < count) {
          params.exp_avg[base + place(e)] = first_codes.codes[e];
          params.exp_avg_sq[base + place(e)] = second_codes.codes[e];
        }
      }
    }
    if (lane == 0) {
      params.exp_avg_scale[block] = first_largest < kSmallestScale ? 0.0f : first_largest;
      params.exp_avg_sq_scale[block] = second_largest < kSmallestScale ? 0.0f : second_largest;
    }
  }
}

}  // namespace pykern::lowrank
