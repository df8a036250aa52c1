// The change of weights with the product that projects the direction up, for compute capability 9.0a.
//
// A block stays on its multiprocessor. A unit of its work is a run of tiles down n, all of the same columns along the
// length: those of the direction, narrowed to the weight's type, stay in shared memory meanwhile. Three warps keep
// copies under way: one of the basis, one of the weights, one back. Two warpgroups take tiles in turn, so that the
// tensor cores work at one's product while the other changes its weights, where they lie in shared memory.
#pragma once

#include "kernels/common/vector.cuh"
#include "kernels/lowrank/apply_layout.h"
#include "kernels/lowrank/grouped.h"
#include "kernels/lowrank/operand_scale.cuh"
#include "kernels/lowrank/tile_sm90.cuh"
#include "kernels/lowrank/weight_change.cuh"

namespace pykern::lowrank {

constexpr int kChangingThreads = 2 * kWarpgroupThreads, kApplyThreadsSm90 = kWarpgroupThreads + kChangingThreads;

// A launch has tensor maps of each matrix's basis and weight, and where there are, of its gradient and compensation. As
// many matrices fit as have two maps.
constexpr int kApplyMatrices = 86, kApplyMaps = 2 * kApplyMatrices;

struct ApplyTableSm90
    : GroupedTable<ApplyMatrix, 16 + kApplyMatrices * static_cast<int>(sizeof(ApplyMatrix) + sizeof(uint32_t))> {
  static_assert(kCapacity == kApplyMatrices, "as many matrices as are planned for");
  int32_t maps_each = 2;
  TensorMap map[kApplyMaps];

  bool takes(int64_t more_tiles) const { return count < kApplyMaps / maps_each && GroupedTable::takes(more_tiles); }
};

struct ApplyCallSm90 {
  ApplyTableSm90 table;  // its tiles are units
  ApplyRule rule;
  ApplyLayout layout;
  int unit_tiles;
};
static_assert(sizeof(ApplyCallSm90) <= 32764, "more than the parameters of a kernel hold");

using BasisTile = PanelTile<kTileRows, kTileDepth>;
template <int width>
using StripTile = PanelTile<kTileDepth, width>;
// Of a weight whose rows are along n, or along the length. Both have as many bytes.
template <int width, bool along_length>
using WeightTile = PanelTile<along_length ? kTileRows : width, along_length ? width : kTileRows>;

template <int width>
struct ApplySharedSm90 {
  StageRing<kBasisStages> basis;
  StageRing<kMostBuffers> weights;
  uint64_t changed[kMostBuffers];  // what is in the buffer can be copied back
  uint64_t multiplied[2];          // a warpgroup's products of a tile are all under way
  float factors[width];
  uint32_t largest[kChangingThreads / kWarpSize];
};

using BasisTurn = StageRing<kBasisStages>::Turn;

// As many buffers as a launch has.
struct BufferTurn : StageRing<kMostBuffers>::Turn {
  __device__ __forceinline__ void next(int buffers) {
    if (++stage == buffers) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Where a unit's tiles begin, and how many there are.
struct ApplyUnit {
  const ApplyMatrix& m;
  const TensorMap* maps;
  int first_length, first_n, tiles;

  // Steps of a product along the rank.
  __device__ __forceinline__ int steps() const { return (m.rank + kTileDepth - 1) / kTileDepth; }
};

template <int width, class Visit>
__device__ __forceinline__ void for_each_unit(const ApplyCallSm90& call, const Visit& visit) {
  for (uint32_t unit = blockIdx.x; unit < call.table.tiles; unit += gridDim.x) {
    const int index = call.table.find(unit);
    const ApplyMatrix& m = call.table.matrix[index];
    const int tiles = (m.n + kTileRows - 1) / kTileRows, runs = (tiles + call.unit_tiles - 1) / call.unit_tiles;
    const int number = static_cast<int>(unit - call.table.first_tile[index]), first = number % runs * call.unit_tiles;
    const int left = tiles - first;
    visit(ApplyUnit{m, call.table.map + index * call.table.maps_each, number / runs * width, first * kTileRows,
                    left < call.unit_tiles ? left : call.unit_tiles});
  }
}

template <class T, int width>
class ApplyBlockSm90 {
  template <bool along_length>
  using Weights = WeightTile<width, along_length>;
  using Strip = StripTile<width>;
  using Shared = ApplySharedSm90<width>;
  static constexpr int kGroups = width / 16;  // of sixteen columns along the length

 public:
  __device__ __forceinline__ ApplyBlockSm90(const ApplyCallSm90& call, unsigned char* memory, Shared& shared)
      : call_(call),
        strip_(memory),
        basis_(memory + call.layout.strip_bytes()),
        buffers_(memory + call.layout.buffers_begin()),
        shared_(shared) {}

  // --- by one thread each ---

  __device__ __forceinline__ void copy_basis() const {
    BasisTurn turn;
    for_each_unit<width>(call_, [&](const ApplyUnit& unit) {
      for (int tile = 0; tile < unit.tiles; ++tile) {
        for (int step = 0; step < unit.steps(); ++step) {
          uint64_t* const full = shared_.basis.begin(turn, BasisTile::kBytes);
          BasisTile::load(basis_tile(turn.stage), unit.maps[0], unit.first_n + tile * kTileRows, step * kTileDepth,
                          full);
          turn.next();
        }
      }
    });
  }

  __device__ __forceinline__ void copy_weights() const {
    BufferTurn turn;
    for_each_unit<width>(call_, [&](const ApplyUnit& unit) {
      for (int tile = 0; tile < unit.tiles; ++tile) {
        uint64_t* const full = shared_.weights.begin(turn, call_.layout.buffer_bytes());
        const int first_n = unit.first_n + tile * kTileRows;
        for (int i = 0; i < call_.layout.tensors; ++i) {
          unsigned char* const target = weight_tile(turn.stage, i);
          if (unit.m.along_length) {
            Weights<true>::load(target, unit.maps[1 + i], first_n, unit.first_length, full);
          } else {
            Weights<false>::load(target, unit.maps[1 + i], unit.first_length, first_n, full);
          }
        }
        turn.next(call_.layout.buffers);
      }
    });
  }

  __device__ __forceinline__ void copy_back() const {
    BufferTurn turn;
    for_each_unit<width>(call_, [&](const ApplyUnit& unit) {
      for (int tile = 0; tile < unit.tiles; ++tile) {
        ptx::mbarrier_wait(&shared_.changed[turn.stage], turn.parity);
        copy_back(turn.stage, 0, unit, tile);
        if (call_.rule.rounding == WeightRounding::kahan) copy_back(turn.stage, call_.layout.tensors - 1, unit, tile);
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
        ptx::mbarrier_arrive(&shared_.weights.empty[turn.stage]);
        turn.next(call_.layout.buffers);
      }
    });
  }

  // --- by two warpgroups ---

  __device__ __forceinline__ void change() const {
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;
    const int group = __shfl_sync(kFullWarp, thread / kWarpgroupThreads, 0);
    BasisTurn basis;
    BufferTurn buffer;
    uint32_t count = 0;  // tiles of the block
    for_each_unit<width>(call_, [&](const ApplyUnit& unit) {
      const WeightChange<T> change(call_.rule, unit.m);
      const float factor = fill_strip(unit, thread);
      for (int tile = 0; tile < unit.tiles; ++tile, ++count) {
        if (static_cast<int>(count % 2) == group) {
          float sums[1][width / 2];
          // The turn of a tile comes when the products of the one before have been started.
          if (count > 0) ptx::mbarrier_wait(&shared_.multiplied[1 - group], (count - 1) / 2 % 2);
          multiply(unit, basis, group, sums);
          shared_.weights.wait_full(buffer);
          const int first_n = unit.first_n + tile * kTileRows;
          if (unit.m.along_length) {
            change_tile<true>(unit, first_n, change, factor, sums[0], buffer.stage);
          } else {
            change_tile<false>(unit, first_n, change, factor, sums[0], buffer.stage);
          }
          ptx::fence_proxy_async();
          __syncwarp();
          if (thread % kWarpSize == 0) ptx::mbarrier_arrive(&shared_.changed[buffer.stage]);
        } else {
          for (int step = 0; step < unit.steps(); ++step) basis.next();
        }
        buffer.next(call_.layout.buffers);
      }
    });
  }

 private:
  __device__ __forceinline__ unsigned char* basis_tile(int stage) const { return basis_ + stage * BasisTile::kBytes; }
  __device__ __forceinline__ unsigned char* weight_tile(int buffer, int tensor) const {
    return buffers_ + (buffer * call_.layout.tensors + tensor) * Weights<true>::kBytes;
  }

  __device__ __forceinline__ void copy_back(int buffer, int tensor, const ApplyUnit& unit, int tile) const {
    const int first_n = unit.first_n + tile * kTileRows;
    const unsigned char* const source = weight_tile(buffer, tensor);
    if (unit.m.along_length) {
      Weights<true>::store(source, unit.maps[1 + tensor], first_n, unit.first_length);
    } else {
      Weights<false>::store(source, unit.maps[1 + tensor], unit.first_length, first_n);
    }
  }

  // --- the strip: the whole rank by `width` columns of the direction ---

  // Packs of a row, rows that the threads load at a time, and loads of each under way: together the rows of a tile.
  static constexpr int kPacks = width / 8, kRows = kChangingThreads / kPacks, kInFlight = kTileDepth / kRows;

  // One pack of eight columns, zeros behind the last row and column.
  __device__ __forceinline__ void load_columns(const ApplyUnit& unit, bool packs, int row, int pack,
                                               float (&values)[8]) const {
    const int length = unit.m.length, column = unit.first_length + 8 * pack;
    const float* const from = static_cast<const float*>(unit.m.direction) + int64_t{row} * length + column;
    const bool exists = row < unit.m.rank;
    if (packs && exists && column + 8 <= length) {
      const Pack<float> left = load_pack(from), right = load_pack(from + 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        values[e] = left[e];
        values[e + 4] = right[e];
      }
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = exists && column + e < length ? from[e] : 0.0f;
    }
  }

  // Calls take(row, pack, values) for all of the thread's.
  template <class Take>
  __device__ __forceinline__ void for_each_pack(const ApplyUnit& unit, int thread, const Take& take) const {
    const bool packs = allows_packs(static_cast<const float*>(unit.m.direction), unit.m.length);
    const int pack = thread % kPacks, rows = unit.steps() * kTileDepth;
#pragma unroll 1
    for (int row = thread / kPacks; row < rows; row += kTileDepth) {
      float values[kInFlight][8];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) load_columns(unit, packs, row + i * kRows, pack, values[i]);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) take(row + i * kRows, pack, values[i]);
    }
  }

  __device__ __forceinline__ float largest_of(const ApplyUnit& unit, int thread) const {
    uint32_t largest = 0;
    for_each_pack(unit, thread, [&](int, int, const float(&values)[8]) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const uint32_t bits = __float_as_uint(values[e]) & 0x7fffffffu;
        largest = bits > largest && bits < 0x7f800000u ? bits : largest;
      }
    });
    largest = __reduce_max_sync(kFullWarp, largest);
    if (thread % kWarpSize == 0) shared_.largest[thread / kWarpSize] = largest;
    ptx::barrier_sync(1, kChangingThreads);
#pragma unroll
    for (int warp = 0; warp < kChangingThreads / kWarpSize; ++warp) {
      largest = shared_.largest[warp] > largest ? shared_.largest[warp] : largest;
    }
    return __uint_as_float(largest);
  }

  // Returns what the sums have to be multiplied by.
  __device__ __forceinline__ float fill_strip(const ApplyUnit& unit, int thread) const {
    // Both warpgroups have multiplied by the strip before.
    ptx::barrier_sync(1, kChangingThreads);
    OperandScale<T> scale;
    if (std::is_same<T, f16>::value) scale.fit(largest_of(unit, thread));
    for_each_pack(unit, thread, [&](int row, int pack, const float(&values)[8]) {
      Pack<T> narrowed;
#pragma unroll
      for (int e = 0; e < 8; ++e) narrow(values[e] * scale.factor, narrowed[e]);
      unsigned char* const panel = strip_ + row / kTileDepth * Strip::kBytes + pack / 8 * Strip::kPanelBytes;
      *reinterpret_cast<Pack<T>*>(panel + row % kTileDepth * kPanelRowBytes + ((pack % 8) ^ (row % 8)) * 16) = narrowed;
    });
    if (unit.m.factors && thread < width) {
      const int column = unit.first_length + thread;
      shared_.factors[thread] = column < unit.m.length ? static_cast<const float*>(unit.m.factors)[column] : 0.0f;
    }
    ptx::fence_proxy_async();
    ptx::barrier_sync(1, kChangingThreads);
    return scale.inverse;
  }

  // --- a tile ---

  __device__ __forceinline__ void multiply(const ApplyUnit& unit, BasisTurn& turn, int group,
                                           float (&sums)[1][width / 2]) const {
    const PanelOperand<BasisTile, ptx::Major::k> basis(basis_);
    const PanelOperand<Strip, ptx::Major::mn> strip(strip_);
    const int steps = unit.steps();
#pragma unroll
    for (int i = 0; i < width / 2; ++i) sums[0][i] = 0;
    keep_sums_in_place(sums);
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      shared_.basis.wait_full(turn);
      ptx::wgmma_fence();
      multiply_panels<T, ptx::Major::k, ptx::Major::mn, kTileDepth>(
          sums, basis.further(turn.stage * BasisTile::kBytes), strip.further(step * Strip::kBytes), 0);
      ptx::wgmma_commit();
      if (step > 0) {
        ptx::wgmma_wait<1>();
        shared_.basis.release(before);
      }
      before = turn.stage;
      turn.next();
    }
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(&shared_.multiplied[group]);
    ptx::wgmma_wait<0>();
    keep_sums_in_place(sums);
    shared_.basis.release(before);
  }

  // Bytes from a tile's origin to the row of a matrix that the lane gives to ldmatrix and stmatrix: of a group of
  // sixteen columns along the length they take what the lane has sums of.
  template <bool along_length>
  static __device__ __forceinline__ int fragment(int group) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x % kWarpgroupThreads / kWarpSize;
    if (along_length) {
      const int row = 16 * warp + lane % 16, chunk = (lane / 16) ^ (lane % 8);
      return group / 4 * Weights<true>::kPanelBytes + ((row * kPanelRowBytes + chunk * 16) ^ (group % 4 * 32));
    }
    const int row = lane / 16 * 8 + lane % 8, chunk = (2 * warp + lane / 8 % 2) ^ (lane % 8);
    return group * 16 * kPanelRowBytes + row * kPanelRowBytes + chunk * 16;
  }

  // Some groups together: the latency of one's loads passes during the others'.
  template <bool along_length>
  __device__ __forceinline__ void change_tile(const ApplyUnit& unit, int first_n, const WeightChange<T>& change,
                                              float factor, const float (&sums)[width / 2], int buffer) const {
    constexpr int kTogether = 4;
    const ApplyMatrix& m = unit.m;
    unsigned char* const weights = weight_tile(buffer, 0);
    const unsigned char* const gradients = weight_tile(buffer, 1);
    unsigned char* const losses = weight_tile(buffer, call_.layout.tensors - 1);
    const WeightRounding rounding = call_.rule.rounding;
    const RandomWords words(unit, first_n, rounding == WeightRounding::stochastic);
#pragma unroll
    for (int first = 0; first < kGroups; first += kTogether) {
      uint32_t weight[kTogether][4];
      float changes[kTogether][8];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        load<along_length>(weight[i], weights, first + i);
#pragma unroll
        for (int e = 0; e < 8; ++e) changes[i][e] = change.scale * (factor * sums[8 * (first + i) + e]);
      }
      if (m.grad) {
        uint32_t gradient[kTogether][4];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) load<along_length>(gradient[i], gradients, first + i);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) add_gradient(gradient[i], first + i, changes[i]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) changes[i][e] = change(half(weight[i][e / 2], e % 2), changes[i][e]);
      }
      if (rounding == WeightRounding::kahan) {
        uint32_t lost[kTogether][4];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) load<along_length>(lost[i], losses, first + i);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          change_kahan(changes[i], weight[i], lost[i]);
          store<along_length>(losses, first + i, lost[i]);
        }
      } else if (rounding == WeightRounding::stochastic) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) change_stochastic(changes[i], words, first + i, weight[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) change_nearest(changes[i], weight[i]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) store<along_length>(weights, first + i, weight[i]);
    }
  }

  template <bool along_length>
  static __device__ __forceinline__ void load(uint32_t (&values)[4], const unsigned char* tile, int group) {
    ptx::ldmatrix<4, !along_length>(values, tile + fragment<along_length>(group));
  }
  template <bool along_length>
  static __device__ __forceinline__ void store(unsigned char* tile, int group, const uint32_t (&values)[4]) {
    ptx::stmatrix<4, !along_length>(tile + fragment<along_length>(group), values);
  }

  // Columns along the length from the first of a group: those of element e of eight, two in each register.
  static __device__ __forceinline__ int column_of(int e) {
    return e / 4 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + e % 2;
  }

  __device__ __forceinline__ void add_gradient(const uint32_t (&gradient)[4], int group, float (&changes)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      changes[e] += half(gradient[e / 2], e % 2) * shared_.factors[16 * group + column_of(e)];
    }
  }

  static __device__ __forceinline__ void change_nearest(const float (&changes)[8], uint32_t (&weights)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = half(weights[i], 0) + changes[2 * i], high = half(weights[i], 1) + changes[2 * i + 1];
      weights[i] = narrow_pair(low, high, T{}).bits;
    }
  }

  // As lowrank::change_kahan, two at a time.
  static __device__ __forceinline__ void change_kahan(const float (&changes)[8], uint32_t (&weights)[4],
                                                      uint32_t (&lost)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = half(weights[i], 0), wanted_low = half(lost[i], 0) + changes[2 * i];
      const float high = half(weights[i], 1), wanted_high = half(lost[i], 1) + changes[2 * i + 1];
      weights[i] = narrow_pair(low + wanted_low, high + wanted_high, T{}).bits;
      lost[i] = narrow_pair(wanted_low - (half(weights[i], 0) - low), wanted_high - (half(weights[i], 1) - high), T{})
                    .bits;
    }
  }

  // Where a lane's weights are in the matrix, for their random words.
  struct RandomWords {
    uint64_t seed;
    int64_t first, below;  // the element in the lane's first row and the unit's first column; how far its other row is
    uint32_t step = 0;

    __device__ __forceinline__ RandomWords(const ApplyUnit& unit, int first_n, bool reads_step)
        : seed(unit.m.seed), below(int64_t{8} * unit.m.length) {
      const int warp = threadIdx.x % kWarpgroupThreads / kWarpSize, lane = threadIdx.x % kWarpSize;
      first = int64_t{first_n + 16 * warp + lane / 4} * unit.m.length + unit.first_length;
      if (reads_step) step = static_cast<uint32_t>(*unit.m.step);
    }
  };

  static __device__ __forceinline__ void change_stochastic(const float (&changes)[8], const RandomWords& words,
                                                           int group, uint32_t (&weights)[4]) {
    T halves[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) halves[e] = {static_cast<uint16_t>(weights[e / 2] >> e % 2 * 16)};
    const auto element = [&](int e) {
      return static_cast<uint64_t>(words.first + 16 * group + column_of(e) + e / 2 % 2 * words.below);
    };
    lowrank::change_stochastic<8>(changes, words.seed, element, words.step, halves);
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = pair_of(halves[2 * i], halves[2 * i + 1]).bits;
  }

  static __device__ __forceinline__ float half(uint32_t bits, int which) {
    return which ? second(Pair<T>{bits}) : first(Pair<T>{bits});
  }

  const ApplyCallSm90& call_;
  unsigned char *const strip_, *const basis_, *const buffers_;
  Shared& shared_;
};

template <class T, int width>
__global__ void __launch_bounds__(kApplyThreadsSm90, 1) apply_sm90_kernel(const __grid_constant__ ApplyCallSm90 call) {
  PYKERN_DYNAMIC_SHARED(memory);
  PYKERN_SHARED(ApplySharedSm90<width>, shared);
  if (is_set(call.rule.found_inf)) return;
  if (threadIdx.x == 0) {
    constexpr int kWarps = kWarpgroupThreads / kWarpSize;
    for (int i = 0; i < kMostBuffers; ++i) ptx::mbarrier_init(&shared.changed[i], kWarps);
    for (int i = 0; i < 2; ++i) ptx::mbarrier_init(&shared.multiplied[i], kWarps);
    shared.weights.init(1);
    shared.basis.init(kWarps);
  }
  __syncthreads();
  const ApplyBlockSm90<T, width> block(call, memory, shared);
  if (threadIdx.x < kWarpgroupThreads) {
    ptx::decrease_registers<40>();
    if (threadIdx.x == 0) block.copy_basis();
    if (threadIdx.x == kWarpSize) block.copy_weights();
    if (threadIdx.x == 2 * kWarpSize) block.copy_back();
  } else {
    ptx::increase_registers<232>();
    block.change();
  }
}

}  // namespace pykern::lowrank
