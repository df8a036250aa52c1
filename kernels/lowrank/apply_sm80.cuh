// The change of weights with the product that projects the direction up: the product's tile stays in the
// multiprocessor, and a weight is read and written once.
#pragma once

#include "kernels/common/reduce.cuh"
#include "kernels/lowrank/operand_scale.cuh"
#include "kernels/lowrank/tile_sm80.cuh"
#include "kernels/lowrank/weight_packs_sm80.cuh"

namespace pykern::lowrank {

constexpr int kApplyTile = 128;  // rows and columns of a weight, as it lies in memory, of a block
constexpr int kApplyDepth = 32;  // of the rank
constexpr int kApplyAcross = 4, kApplyDown = kApplyWarps / kApplyAcross;
constexpr int kApplyRowBlocks = kApplyTile / kApplyDown / 16, kApplyColumnBlocks = kApplyTile / kApplyAcross / 16;
constexpr int kApplyBasisBytes = 2 * kApplyTile * kApplyDepth;
constexpr int kApplyStageBytes = 2 * kApplyBasisBytes;  // the basis, and as many elements of the direction
// Sums are staged as floats, half of each warp's rows at a time. Eight floats between rows let a warp's lanes write to
// different banks.
constexpr int kSlabStride = kApplyTile + 8;
constexpr int kSlabBytes = kSlabRows * kSlabStride * 4;
constexpr int kApplySharedBytes = kSlabBytes > 2 * kApplyStageBytes ? kSlabBytes : 2 * kApplyStageBytes;
static_assert(kSlabPacks * 8 == kApplyTile && 2 * kSlabRows == kApplyTile, "two slabs are a tile");

struct ApplyShared {
  uint16_t codes[2][kSlabRows * kSlabPacks];
  WarpValues<float> largest;
};

template <class T, bool along_length>
class UpProjection {
 public:
  using Sums = WarpSums<kApplyRowBlocks, kApplyColumnBlocks>;

  // The tile's first row of the basis, and first column of the low-rank matrix.
  __device__ __forceinline__ UpProjection(const ApplyMatrix& m, const float* low, int first_n, int first_length,
                                          unsigned char* shared, WarpValues<float>& largest)
      : basis_(m.projector, m.rank, m.n, m.rank),
        low_(low),
        length_(m.length),
        low_packs_(allows_packs(low, m.length)),
        first_n_(first_n),
        first_length_(first_length),
        shared_(shared) {
    if (std::is_same<T, f16>::value) scale_.fit(largest_of(largest));
  }

  __device__ __forceinline__ void run(Sums& sums) const {
    const int steps = (basis_.columns + kApplyDepth - 1) / kApplyDepth;
    float values[2][8];
    load(0, values);
    copy_basis(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      store(step, values);
      ptx::cp_async_wait_all();
      __syncthreads();
      if (step + 1 < steps) {
        copy_basis(step + 1);
        load(step + 1, values);
      }
      multiply(step, sums);
    }
  }

  __device__ __forceinline__ float inverse_scale() const { return scale_.inverse; }

 private:
  __device__ __forceinline__ unsigned char* basis_tile(int step) const { return shared_ + step % 2 * kApplyStageBytes; }
  __device__ __forceinline__ unsigned char* low_tile(int step) const { return basis_tile(step) + kApplyBasisBytes; }

  __device__ __forceinline__ float largest_of(WarpValues<float>& shared) const {
    const int column = first_length_ + static_cast<int>(threadIdx.x % kApplyTile);
    float largest = 0;
    if (column < length_) {
#pragma unroll 4
      for (int row = threadIdx.x / kApplyTile; row < basis_.columns; row += kApplyThreads / kApplyTile) {
        const float value = fabsf(low_[int64_t{row} * length_ + column]);
        largest = value > largest && __float_as_uint(value) < 0x7f800000u ? value : largest;
      }
    }
    return block_reduce(largest, 0.0f, Largest(), shared);
  }

  __device__ __forceinline__ void copy_basis(int step) const {
    copy_tile<kApplyTile, kApplyDepth, kApplyThreads>(basis_tile(step), basis_, first_n_, step * kApplyDepth);
  }

  __device__ __forceinline__ void load(int step, float (&values)[2][8]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int thread = ptx::forget_origin(static_cast<int>(threadIdx.x));
      const int row = step * kApplyDepth + i * 16 + thread / 16, column = first_length_ + thread % 16 * 8;
      const float* const from = low_ + int64_t{row} * length_ + column;
      const bool exists = row < basis_.columns;
      if (low_packs_ && exists && column + 8 <= length_) {
        const Pack<float> left = load_pack(from), right = load_pack(from + 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          values[i][e] = left[e];
          values[i][e + 4] = right[e];
        }
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) values[i][e] = exists && column + e < length_ ? from[e] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void store(int step, const float (&values)[2][8]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < 8; ++e) narrow(values[i][e] * scale_.factor, pack[e]);
      const int row = i * 16 + static_cast<int>(threadIdx.x) / 16;
      *reinterpret_cast<Pack<T>*>(low_tile(step) + SharedTile<kApplyTile>::offset(row, threadIdx.x % 16)) = pack;
    }
  }

  // The basis gives the rows of a weight whose rows are along n, and the columns of one whose columns are.
  __device__ __forceinline__ void multiply(int step, Sums& sums) const {
    const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const unsigned row = warp / kApplyAcross * (kApplyTile / kApplyDown);
    const unsigned column = warp % kApplyAcross * (kApplyTile / kApplyAcross);
    const LaneAddress<kApplyDepth> basis_lane(
        along_length ? row + lane % 16 : column + lane % 8 + lane / 16 * 8, along_length ? lane / 16 : lane / 8 % 2);
    const LaneAddress<kApplyTile> low_lane(along_length ? lane % 16 : lane % 8 + lane / 16 * 8,
                                           along_length ? column / 8 + lane / 16 : row / 8 + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kApplyDepth / 16; ++k) {
      uint32_t a[kApplyRowBlocks][4], b[kApplyColumnBlocks][4];
#pragma unroll
      for (int i = 0; i < kApplyRowBlocks; ++i) {
        if (along_length) {
          ptx::ldmatrix<4>(a[i], basis_lane.at(basis_tile(step), 16 * i, k));
        } else {
          ptx::ldmatrix<4, true>(a[i], low_lane.at(low_tile(step), 16 * k, i));
        }
      }
#pragma unroll
      for (int j = 0; j < kApplyColumnBlocks; ++j) {
        if (along_length) {
          ptx::ldmatrix<4, true>(b[j], low_lane.at(low_tile(step), 16 * k, j));
        } else {
          ptx::ldmatrix<4>(b[j], basis_lane.at(basis_tile(step), 16 * j, k));
        }
      }
      sums.template add<T>(a, b);
    }
  }

  const Rows<T> basis_;
  const float* const low_;
  const int length_;
  const bool low_packs_;
  const int first_n_, first_length_;
  unsigned char* const shared_;
  OperandScale<T> scale_;
};

// A slab of sums, and the codes of the signs.
template <class T, bool along_length>
struct StagedSums {
  using Packs = WeightPacks<T, along_length>;

  const float* sums;
  uint16_t* codes;  // of the slab

  static __device__ __forceinline__ int index(const typename Packs::Place& place) {
    return place.slab_row * kSlabPacks + place.slab_pack;
  }
  __device__ __forceinline__ void up(const typename Packs::Place& place, float (&values)[8]) const {
    const float* const from = sums + place.slab_row * kSlabStride + 8 * place.slab_pack;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pack<float> pack = *reinterpret_cast<const Pack<float>*>(from + 4 * half);
#pragma unroll
      for (int e = 0; e < 4; ++e) values[4 * half + e] = pack[e];
    }
  }
  __device__ __forceinline__ float sign(const typename Packs::Place& place, int e, float) const {
    return sign_of_code(codes[index(place)] >> (2 * e) & 3);
  }
  __device__ __forceinline__ void keep(const typename Packs::Place& place, uint32_t value) const {
    codes[index(place)] = static_cast<uint16_t>(value);
  }
};

// Where row s of a slab is in the tile: half of each warp's rows.
__device__ __forceinline__ int tile_row(int slab, int s) {
  constexpr int kWarpRows = kApplyTile / kApplyDown, kHalf = kWarpRows / 2;
  return s / kHalf * kWarpRows + slab * kHalf + s % kHalf;
}

template <class T, bool along_length>
class ApplyTile {
  using Packs = WeightPacks<T, along_length>;
  using Product = UpProjection<T, along_length>;

 public:
  __device__ __forceinline__ ApplyTile(const ApplyMatrix& m, const ApplyRule& rule, int first_row, int first_column,
                                       unsigned char* memory, ApplyShared& shared)
      : m_(m), rule_(rule), first_row_(first_row), first_column_(first_column), memory_(memory), shared_(shared) {}

  // The lines that the change will read arrive in L2 during the product: each thread fetches half a row's.
  __device__ __forceinline__ void fetch() const {
    const int row = first_row_ + static_cast<int>(threadIdx.x) / 2;
    const int column = first_column_ + static_cast<int>(threadIdx.x) % 2 * (kApplyTile / 2);
    if (row >= (along_length ? m_.n : m_.length) || column >= (along_length ? m_.length : m_.n)) return;
    ptx::prefetch_l2(static_cast<const T*>(m_.param) + row * m_.param_stride + column);
    if (m_.grad) ptx::prefetch_l2(static_cast<const T*>(m_.grad) + row * m_.grad_stride + column);
    if (m_.compensation) ptx::prefetch_l2(static_cast<const T*>(m_.compensation) + row * m_.param_stride + column);
  }

  // With kCodes the signs of what `low` leaves of the gradient are kept; else the weights change.
  template <bool kCodes>
  __device__ __forceinline__ void run(const void* low) const {
    typename Product::Sums sums;
    sums.clear();
    float factor = 1;
    if (low) {
      const Product product(m_, static_cast<const float*>(low), along_length ? first_row_ : first_column_,
                            along_length ? first_column_ : first_row_, memory_, shared_.largest);
      product.run(sums);
      factor = product.inverse_scale();
    }
    const Packs packs(m_, rule_);
    const bool inside = packs.inside(first_row_, first_column_, kApplyTile);
#pragma unroll
    for (int slab = 0; slab < 2; ++slab) {
      __syncthreads();
      stage(sums, slab, factor);
      __syncthreads();
      StagedSums<T, along_length> source{reinterpret_cast<const float*>(memory_), shared_.codes[slab]};
      packs.template visit<kCodes>([&](int s) { return first_row_ + tile_row(slab, s); }, first_column_, inside,
                                   source);
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void stage(const typename Product::Sums& sums, int slab, float factor) const {
    constexpr int kHalf = kApplyRowBlocks / 2;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    float* const target = reinterpret_cast<float*>(memory_) +
                          (warp / kApplyAcross * (16 * kHalf) + lane / 4) * kSlabStride +
                          warp % kApplyAcross * (kApplyTile / kApplyAcross) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kApplyColumnBlocks; ++j) {
        const float(&values)[4] = sums.values[slab * kHalf + i][j];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const to = target + (16 * i + 8 * half) * kSlabStride + 8 * j;
          *reinterpret_cast<FloatPair*>(to) = {factor * values[2 * half], factor * values[2 * half + 1]};
        }
      }
    }
  }

  const ApplyMatrix& m_;
  const ApplyRule& rule_;
  const int first_row_, first_column_;
  unsigned char* const memory_;
  ApplyShared& shared_;
};

template <class T, bool along_length>
__global__ void __launch_bounds__(kApplyThreads, 2) apply_kernel(const __grid_constant__ ApplyCall call) {
  PYKERN_DYNAMIC_SHARED(memory);
  PYKERN_SHARED(ApplyShared, shared);
  if (is_set(call.rule.found_inf)) return;
  const int index = call.table.find(blockIdx.x);
  const ApplyMatrix& m = call.table.matrix[index];
  // Neighbouring blocks share the larger of both operands, the floats of the direction.
  const int tile = static_cast<int>(blockIdx.x - call.table.first_tile[index]);
  const int n_tiles = (m.n + kApplyTile - 1) / kApplyTile;
  const int first_n = tile % n_tiles * kApplyTile, first_length = tile / n_tiles * kApplyTile;
  const ApplyTile<T, along_length> weights(m, call.rule, along_length ? first_n : first_length,
                                           along_length ? first_length : first_n, memory, shared);
  weights.fetch();
  if (m.low) weights.template run<true>(m.low);
  weights.template run<false>(m.direction);
}

}  // namespace pykern::lowrank
