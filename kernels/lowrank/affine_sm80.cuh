// Quantisation in groups and its inverse: bound by memory.
//
// Where the columns are neighbours in memory a warp owns one group, eight values a lane, in registers. Else a block
// turns a tile of kTileRows groups in shared memory, so that memory is walked through along its unit stride.
#pragma once

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/lowrank/affine.h"
#include "kernels/lowrank/compute.cuh"
#include "kernels/lowrank/grouped.h"

namespace pykern::lowrank {

constexpr int kAffineThreads = 256;
constexpr int kAffineWarps = kAffineThreads / kWarpSize;
constexpr int kGroupValues = kAffineGroup / kWarpSize;  // of a lane
constexpr int kTileRows = 32;
static_assert(kGroupValues == 8, "a lane's codes are one access of eight or four bytes");

// Odd rows of floats: neither a row nor a column meets one bank twice.
struct AffineTile {
  float values[kTileRows][kAffineGroup + 1];
};

struct AffineScale {
  float scale, zero;
};

union GroupCodes {
  uint64_t bits;
  uint8_t codes[kGroupValues];
};

// A NaN wins.
struct SmallerValue {
  __device__ __forceinline__ float operator()(float a, float b) const { return a < b || a != a ? a : b; }
};
struct LargerValue {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(double value) { return static_cast<float>(value); }

// Of the values of a warp, of which this lane has those whose place is below `count`.
template <class Place>
__device__ __forceinline__ AffineScale scale_of_group(const float (&values)[kGroupValues], int count, int bits,
                                                      const Place& place) {
  const float infinity = __int_as_float(0x7f800000);
  float smallest = infinity, largest = -infinity;
#pragma unroll
  for (int e = 0; e < kGroupValues; ++e) {
    if (place(e) < count) {
      smallest = SmallerValue()(values[e], smallest);
      largest = LargerValue()(values[e], largest);
    }
  }
  smallest = warp_reduce(smallest, SmallerValue());
  largest = warp_reduce(largest, LargerValue());
  const float range = largest - smallest;
  if (!(range < infinity)) return {__int_as_float(0x7fc00000), __int_as_float(0x7fc00000)};
  return {range / largest_code(bits), smallest};
}

// The code before it is rounded; zero where the group has one value or none that is a number.
__device__ __forceinline__ float code_of(float value, const AffineScale& group, float largest) {
  const float code = group.scale > 0 ? (value - group.zero) / group.scale : 0.0f;
  return code < largest ? code : largest;
}

__device__ __forceinline__ uint8_t nearest_code(float value, const AffineScale& group, float largest) {
  return static_cast<uint8_t>(rintf(code_of(value, group, largest)));
}

// Eight codes of a lane to and from memory; 4-bit ones two to a byte.
__device__ __forceinline__ void store_codes(uint8_t* target, const GroupCodes& codes, int bits) {
  if (bits == 8) {
    *reinterpret_cast<uint64_t*>(target) = codes.bits;
    return;
  }
  uint32_t packed = 0;
#pragma unroll
  for (int e = 0; e < kGroupValues; ++e) packed |= static_cast<uint32_t>(codes.codes[e]) << (4 * e);
  *reinterpret_cast<uint32_t*>(target) = packed;
}

__device__ __forceinline__ GroupCodes load_codes(const uint8_t* source, int bits) {
  GroupCodes codes{};
  if (bits == 8) {
    codes.bits = *reinterpret_cast<const uint64_t*>(source);
    return codes;
  }
  const uint32_t packed = *reinterpret_cast<const uint32_t*>(source);
#pragma unroll
  for (int e = 0; e < kGroupValues; ++e) codes.codes[e] = static_cast<uint8_t>(packed >> (4 * e) & 15);
  return codes;
}

// --- warps that own groups, in packs ------------------------------------------------------------------

// A group of one matrix, counted along its rows.
struct GroupPlace {
  int64_t row, group, first;
  int count;

  __device__ __forceinline__ GroupPlace(const AffineMatrix& matrix, int64_t index) {
    const int64_t groups = affine_groups(matrix.columns);
    row = index / groups;
    group = index;
    first = (index - row * groups) * kAffineGroup;
    const int64_t rest = matrix.columns - first;
    count = rest < kAffineGroup ? static_cast<int>(rest) : kAffineGroup;
  }
};

using AffineTable = GroupedTable<AffineMatrix>;

// A block has the groups of kAffineWarps warps, one matrix's; the last block of a matrix has fewer.
template <class Body>
__device__ __forceinline__ void own_group(const AffineMatrix& matrix, int64_t block, const Body& body) {
  const int64_t index = block * kAffineWarps + threadIdx.x / kWarpSize;
  if (index < matrix.rows * affine_groups(matrix.columns)) body(GroupPlace(matrix, index));
}

// The number of columns is a multiple of a lane's values: a lane has all of them or none.
template <class T>
__global__ void __launch_bounds__(kAffineThreads)
    quantize_packs_kernel(const __grid_constant__ AffineTable table, const __grid_constant__ AffineParams params) {
  if (is_set(params.found_inf)) return;
  constexpr int kSize = Pack<T>::kSize;
  const int found = table.find(blockIdx.x);
  const AffineMatrix& matrix = table.matrix[found];
  const int lane = threadIdx.x % kWarpSize, bits = params.bits;
  const float largest = largest_code(bits);
  const auto place = [&](int e) { return lane * kGroupValues + e; };
  own_group(matrix, blockIdx.x - table.first_tile[found], [&](const GroupPlace& group) {
    const bool mine = place(0) < group.count;
    const T* source = static_cast<const T*>(matrix.values) + group.row * matrix.row_stride + group.first + place(0);
    float values[kGroupValues] = {};
    if (mine) {
#pragma unroll
      for (int part = 0; part < kGroupValues / kSize; ++part) {
        const Pack<T> pack = load_pack<Reuse::stream>(source + part * kSize);
#pragma unroll
        for (int e = 0; e < kSize; ++e) values[part * kSize + e] = widen(pack[e]);
      }
    }
    const AffineScale scale = scale_of_group(values, group.count, bits, place);
    GroupCodes codes{};
#pragma unroll
    for (int e = 0; e < kGroupValues; ++e) codes.codes[e] = nearest_code(values[e], scale, largest);
    if (mine) {
      uint8_t* row = matrix.codes + group.row * code_bytes(matrix.columns, bits);
      store_codes(row + code_bytes(group.first + place(0), bits), codes, bits);
    }
    if (lane == 0) {
      matrix.scale[group.group] = scale.scale;
      matrix.zero[group.group] = scale.zero;
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kAffineThreads)
    dequantize_packs_kernel(const __grid_constant__ AffineTable table, const __grid_constant__ AffineParams params) {
  constexpr int kSize = Pack<T>::kSize;
  const int found = table.find(blockIdx.x);
  const AffineMatrix& matrix = table.matrix[found];
  const int lane = threadIdx.x % kWarpSize, bits = params.bits;
  const float divisor = params.grad_scale != nullptr ? *params.grad_scale : 1.0f;
  const int place = lane * kGroupValues;
  own_group(matrix, blockIdx.x - table.first_tile[found], [&](const GroupPlace& group) {
    if (place >= group.count) return;
    const uint8_t* row = matrix.codes + group.row * code_bytes(matrix.columns, bits);
    const GroupCodes codes = load_codes(row + code_bytes(group.first + place, bits), bits);
    const float scale = matrix.scale[group.group], zero = matrix.zero[group.group];
    T* target = static_cast<T*>(matrix.values) + group.row * matrix.row_stride + group.first + place;
#pragma unroll
    for (int part = 0; part < kGroupValues / kSize; ++part) {
      Pack<T> pack{};
      if (params.adds) pack = load_pack<Reuse::stream>(target + part * kSize);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        float value = zero + scale * codes.codes[part * kSize + e];
        if (params.adds) value += params.sign * widen(pack[e]) / divisor;
        narrow(value, pack[e]);
      }
      store_pack(target + part * kSize, pack);
    }
  });
}

// --- blocks that own tiles -----------------------------------------------------------------------------

// kTileRows rows of one group's columns, counted along the rows of the matrix.
struct TilePlace {
  int64_t first_row, group, first;
  int rows, columns;
};

__device__ __forceinline__ TilePlace tile_of(const AffineMatrix& matrix, int64_t index) {
  const int64_t groups = affine_groups(matrix.columns), row_tile = index / groups, group = index - row_tile * groups;
  const int64_t rows = matrix.rows - row_tile * kTileRows, columns = matrix.columns - group * kAffineGroup;
  return {row_tile * kTileRows, group, group * kAffineGroup, rows < kTileRows ? static_cast<int>(rows) : kTileRows,
          columns < kAffineGroup ? static_cast<int>(columns) : kAffineGroup};
}

// Every element of the tile, neighbouring threads along the unit stride of memory.
template <class Body>
__device__ __forceinline__ void each_element(const AffineMatrix& matrix, const TilePlace& tile, const Body& body) {
  const bool along_rows = matrix.row_stride == 1 && matrix.column_stride != 1;
  for (int index = threadIdx.x; index < kTileRows * kAffineGroup; index += kAffineThreads) {
    const int row = along_rows ? index % kTileRows : index / kAffineGroup;
    const int column = along_rows ? index / kTileRows : index % kAffineGroup;
    if (row < tile.rows && column < tile.columns) {
      body(row, column, (tile.first_row + row) * matrix.row_stride + (tile.first + column) * matrix.column_stride);
    }
  }
}

// A lane's values are pairs, so that a byte of 4-bit codes is of one lane.
__device__ __forceinline__ int paired_place(int lane, int e) { return (e / 2 * kWarpSize + lane) * 2 + e % 2; }

template <class T>
__global__ void __launch_bounds__(kAffineThreads)
    quantize_tiles_kernel(const __grid_constant__ AffineTable table, const __grid_constant__ AffineParams params) {
  PYKERN_SHARED(AffineTile, shared);
  if (is_set(params.found_inf)) return;
  const int found = table.find(blockIdx.x);
  const AffineMatrix& matrix = table.matrix[found];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, bits = params.bits;
  const float largest = largest_code(bits);
  const int64_t groups = affine_groups(matrix.columns), row_bytes = code_bytes(matrix.columns, bits);
  const auto place = [&](int e) { return paired_place(lane, e); };
  const TilePlace tile = tile_of(matrix, blockIdx.x - table.first_tile[found]);
  each_element(matrix, tile, [&](int row, int column, int64_t offset) {
    shared.values[row][column] = as_float(widen(static_cast<const T*>(matrix.values)[offset]));
  });
  __syncthreads();
  for (int row = warp; row < tile.rows; row += kAffineWarps) {
    float values[kGroupValues];
#pragma unroll
    for (int e = 0; e < kGroupValues; ++e) {
      values[e] = place(e) < tile.columns ? shared.values[row][place(e)] : 0.0f;
    }
    const AffineScale scale = scale_of_group(values, tile.columns, bits, place);
    uint8_t* codes = matrix.codes + (tile.first_row + row) * row_bytes + code_bytes(tile.first, bits);
#pragma unroll
    for (int e = 0; e < kGroupValues; e += 2) {
      const bool second = place(e + 1) < tile.columns;
      const uint8_t low = nearest_code(values[e], scale, largest);
      const uint8_t high = second ? nearest_code(values[e + 1], scale, largest) : uint8_t{0};
      if (place(e) < tile.columns) {
        if (bits == 8) {
          codes[place(e)] = low;
          if (second) codes[place(e + 1)] = high;
        } else {
          codes[place(e) / 2] = static_cast<uint8_t>(low | high << 4);
        }
      }
    }
    if (lane == 0) {
      matrix.scale[(tile.first_row + row) * groups + tile.group] = scale.scale;
      matrix.zero[(tile.first_row + row) * groups + tile.group] = scale.zero;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kAffineThreads)
    dequantize_tiles_kernel(const __grid_constant__ AffineTable table, const __grid_constant__ AffineParams params) {
  using C = Compute<T>;
  PYKERN_SHARED(AffineTile, shared);
  const int found = table.find(blockIdx.x);
  const AffineMatrix& matrix = table.matrix[found];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, bits = params.bits;
  const C divisor = params.grad_scale != nullptr ? static_cast<C>(*params.grad_scale) : C(1);
  const C sign = static_cast<C>(params.sign);
  const int64_t groups = affine_groups(matrix.columns), row_bytes = code_bytes(matrix.columns, bits);
  const TilePlace tile = tile_of(matrix, blockIdx.x - table.first_tile[found]);
  for (int row = warp; row < tile.rows; row += kAffineWarps) {
    const uint8_t* codes = matrix.codes + (tile.first_row + row) * row_bytes + code_bytes(tile.first, bits);
    const float scale = matrix.scale[(tile.first_row + row) * groups + tile.group];
    const float zero = matrix.zero[(tile.first_row + row) * groups + tile.group];
#pragma unroll
    for (int e = 0; e < kGroupValues; ++e) {
      const int column = paired_place(lane, e);
      if (column < tile.columns) {
        const int code = bits == 8 ? codes[column] : codes[column / 2] >> (4 * (e % 2)) & 15;
        shared.values[row][column] = zero + scale * static_cast<float>(code);
      }
    }
  }
  __syncthreads();
  each_element(matrix, tile, [&](int row, int column, int64_t offset) {
    T& target = static_cast<T*>(matrix.values)[offset];
    C value = static_cast<C>(shared.values[row][column]);
    if (params.adds) value += sign * static_cast<C>(widen(target)) / divisor;
    narrow(value, target);
  });
}

}  // namespace pykern::lowrank
