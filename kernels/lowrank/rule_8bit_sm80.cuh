// The inner rules on 8-bit block-wise moments: dequantise, advance, requantise in one pass.
//
// A warp owns one block of 256 values, eight a lane, in registers from the load of its codes to the store of
// the new ones; the new scales are reductions over its lanes.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/lowrank/dynamic_map.h"
#include "kernels/lowrank/rule_sm80.cuh"

namespace pykern::lowrank {

constexpr int kQuantThreads = 256;
constexpr int kQuantWarps = kQuantThreads / kWarpSize;
constexpr int kLaneValues = kQuantBlock / kWarpSize;
constexpr int kQuantResident = 4;  // thread blocks per multiprocessor
static_assert(kLaneValues == 8, "a lane's codes are one eight-byte access");

// In constant memory: beside a table they would be too much for a kernel's parameters.
__constant__ DynamicMap kFirstMap = kSignedMap;
__constant__ DynamicMap kSecondMap = kUnsignedMap;

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

// A lane's share of one moment's block.
template <bool kSigned>
struct LaneMoment {
  LaneCodes codes;
  float values[kLaneValues];

  // Where in its block value e lies. In packs a lane's values are neighbours; else neighbouring lanes take
  // neighbouring values.
  static __device__ __forceinline__ int place(bool packs, int e) {
    const int lane = threadIdx.x % kWarpSize;
    return packs ? lane * kLaneValues + e : e * kWarpSize + lane;
  }

  __device__ __forceinline__ void load(const uint8_t* block, float scale, int count, bool packs,
                                       const MapTables& tables) {
    codes.bits = 0;
    if (packs) {
      // The length is a multiple of a lane's values: a lane has all of them or none.
      if (place(true, 0) < count) codes.bits = *reinterpret_cast<const uint64_t*>(block + place(true, 0));
    } else {
#pragma unroll
      for (int e = 0; e < kLaneValues; ++e) {
        if (place(false, e) < count) codes.codes[e] = block[place(false, e)];
      }
    }
#pragma unroll
    for (int e = 0; e < kLaneValues; ++e) {
      values[e] = place(packs, e) < count ? tables.values[kSigned ? 0 : 1][codes.codes[e]] * scale : 0.0f;
    }
  }

  // Returns the scale, in every lane.
  __device__ __forceinline__ void store(uint8_t* block, float* scale, int count, bool packs, const MapTables& tables,
                                        const DynamicMap& map) {
    float largest = 0;
#pragma unroll
    for (int e = 0; e < kLaneValues; ++e) largest = larger(fabsf(values[e]), largest);
    largest = warp_reduce(largest, Larger());
    const float reciprocal = reciprocal_scale(largest);
#pragma unroll
    for (int e = 0; e < kLaneValues; ++e) {
      const int number = nearest(tables.levels[kSigned ? 0 : 1], map.smallest, map.top, kSigned ? 128 : 255,
                                 fabsf(values[e]) * reciprocal);
      // There is no minus one: its nearest value is the last cell's.
      const int code = !kSigned ? number : values[e] < 0 ? 127 - (number < 127 ? number : 127) : 127 + number;
      codes.codes[e] = static_cast<uint8_t>(code);
    }
    if (packs) {
      if (place(true, 0) < count) *reinterpret_cast<uint64_t*>(block + place(true, 0)) = codes.bits;
    } else {
#pragma unroll
      for (int e = 0; e < kLaneValues; ++e) {
        if (place(false, e) < count) block[place(false, e)] = codes.codes[e];
      }
    }
    if (threadIdx.x % kWarpSize == 0) *scale = largest < kSmallestScale ? 0.0f : largest;
  }
};

// A lane's share of the projected gradient, or of the direction.
struct LaneGradient {
  static constexpr int kParts = kLaneValues / Pack<float>::kSize;
  Pack<float> packs[kParts];

  __device__ __forceinline__ float& operator[](int e) { return packs[e / Pack<float>::kSize][e % Pack<float>::kSize]; }

  __device__ __forceinline__ void load(const float* block, int count, bool wide) {
    if (wide) {
      const int begin = LaneMoment<true>::place(true, 0);
      if (begin < count) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) packs[part] = load_pack(block + begin + part * Pack<float>::kSize);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kLaneValues; ++e) {
        const int place = LaneMoment<true>::place(false, e);
        if (place < count) (*this)[e] = block[place];
      }
    }
  }

  __device__ __forceinline__ void store(float* block, int count, bool wide) {
    if (wide) {
      const int begin = LaneMoment<true>::place(true, 0);
      if (begin < count) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) store_pack(block + begin + part * Pack<float>::kSize, packs[part]);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kLaneValues; ++e) {
        const int place = LaneMoment<true>::place(false, e);
        if (place < count) block[place] = (*this)[e];
      }
    }
  }
};

// One tile of the table: a block of 256 values for each warp. Blocks of threads that stay fill the tables of the maps
// once.
template <bool kSecond>
__global__ void __launch_bounds__(kQuantThreads, kQuantResident)
    inner_rule_8bit_kernel(const __grid_constant__ RuleTable table, const __grid_constant__ RuleParams params) {
  PYKERN_SHARED(MapTables, tables);
  for (int code = threadIdx.x; code < kCodes; code += kQuantThreads) {
    tables.values[0][code] = kFirstMap.values[code];
    if (kSecond) tables.values[1][code] = kSecondMap.values[code];
  }
  if (threadIdx.x < kLevels) {
    tables.levels[0][threadIdx.x] = kFirstMap.levels[threadIdx.x];
    tables.levels[1][threadIdx.x] = kSecondMap.levels[threadIdx.x];
  }
  __syncthreads();

  const bool stopped = is_set(params.found_inf);
  for (uint32_t tile = blockIdx.x; tile < table.tiles; tile += gridDim.x) {
    const int found = table.find(tile);
    const RuleMatrix& matrix = table.matrix[found];
    const int64_t row_blocks = quant_blocks(matrix.length);
    const int64_t block = int64_t{tile - table.first_tile[found]} * kQuantWarps + threadIdx.x / kWarpSize;
    if (block >= matrix.rank * row_blocks) continue;
    const int64_t row = block / row_blocks, begin = (block - row * row_blocks) * kQuantBlock;
    const int64_t rest = matrix.length - begin, base = row * matrix.length + begin;
    const int count = rest < kQuantBlock ? static_cast<int>(rest) : kQuantBlock;
    const bool packs = matrix.packs;

    LaneGradient gradient{};
    if (!stopped) {
      gradient.load(static_cast<const float*>(matrix.low) + base, count, packs);
      LaneMoment<true> first;
      LaneMoment<false> second;
      first.load(static_cast<const uint8_t*>(matrix.exp_avg) + base, matrix.exp_avg_scale[block], count, packs, tables);
      if (kSecond) {
        second.load(static_cast<const uint8_t*>(matrix.exp_avg_sq) + base, matrix.exp_avg_sq_scale[block], count, packs,
                    tables);
      }
      const RuleFactors<float>& rule = matrix.rule->single;
#pragma unroll
      for (int e = 0; e < kLaneValues; ++e) {
        if (LaneMoment<true>::place(packs, e) >= count) continue;
        float& value = gradient[e];
        if (kSecond) {
          value = params.rule == InnerRule::adamw
                      ? advance<InnerRule::adamw>(rule, value, first.values[e], second.values[e])
                      : advance<InnerRule::adabelief>(rule, value, first.values[e], second.values[e]);
        } else {
          float none = 0;
          value = params.rule == InnerRule::lion ? advance<InnerRule::lion>(rule, value, first.values[e], none)
                                                 : advance<InnerRule::momentum>(rule, value, first.values[e], none);
        }
      }
      first.store(static_cast<uint8_t*>(matrix.exp_avg) + base, matrix.exp_avg_scale + block, count, packs, tables,
                  kFirstMap);
      if (kSecond) {
        second.store(static_cast<uint8_t*>(matrix.exp_avg_sq) + base, matrix.exp_avg_sq_scale + block, count, packs,
                     tables, kSecondMap);
      }
    }
    gradient.store(static_cast<float*>(matrix.direction) + base, count, packs);
  }
}

}  // namespace pykern::lowrank
