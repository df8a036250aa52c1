// Tiles of 16-bit elements in shared memory: filled by cp.async, read by ldmatrix without bank conflicts.
#pragma once

#include "kernels/ptx/sm80.cuh"

namespace pykern {

// Rows of `columns` elements. Within a row, chunks of 16 bytes are permuted so that one chunk of eight neighbouring
// rows, as ldmatrix reads them, lies in all 32 banks.
template <int columns>
struct SharedTile {
  static_assert(columns % 32 == 0, "rows are multiples of 64 bytes");
  static constexpr int kRowBytes = 2 * columns;
  static constexpr int kChunks = columns / 8;
  // Rows that are multiples of 128 bytes all begin in bank 0; of other rows every second one does.
  static constexpr bool kWide = columns % 64 == 0;
  static constexpr int kMask = kWide ? 7 : 3;

  static __device__ __forceinline__ unsigned swizzle(unsigned row) { return (kWide ? row : row / 2) & kMask; }
  static __device__ __forceinline__ unsigned offset(unsigned row, unsigned chunk) {
    return row * kRowBytes + ((chunk ^ swizzle(row)) << 4);
  }
};

// The address that one lane gives to ldmatrix, for matrices anywhere in a tile. What depends on the lane is computed
// once: the rest is an exclusive or and constants.
template <int columns>
class LaneAddress {
  using Tile = SharedTile<columns>;

 public:
  // The lane's row and chunk (0 or 1) where the matrices lie at the tile's origin.
  __device__ __forceinline__ LaneAddress(unsigned row, unsigned chunk)
      : row_(row * Tile::kRowBytes), chunk_(chunk ^ Tile::swizzle(row)) {}

  // `rows` below the origin, a multiple of 8, and 16 * `pair` elements to its right.
  __device__ __forceinline__ const void* at(const unsigned char* tile, int rows, int pair) const {
    const int low = 2 * pair & Tile::kMask, high = 2 * pair & ~Tile::kMask;
    return tile + row_ + ((chunk_ ^ low) << 4) + rows * Tile::kRowBytes + 16 * high;
  }

 private:
  unsigned row_, chunk_;
};

// Matrices 0 to 3 of ldmatrix are the lower rows and columns first, then the upper rows (or columns) of a 16 x 16
// block, as operand A of mma.m16n8k16 takes them (rows first) and two operands B, one for each 8 keys (columns first).
template <int columns>
__device__ __forceinline__ LaneAddress<columns> lane_rows_first(unsigned lane) {
  return {lane % 16, lane / 16};
}
template <int columns>
__device__ __forceinline__ LaneAddress<columns> lane_columns_first(unsigned lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

// Sixteen bytes of a row and those behind them, or zeros.
struct RowSource {
  const unsigned char* data;
  bool exists;
};

// Starts to copy `rows` rows of `size` elements (a multiple of 8, at most `columns`) with zeros behind them.
// source_of(row) is where a row begins; it is asked in falling order.
template <int columns, int rows, int threads, class SourceOf>
__device__ __forceinline__ void copy_rows(unsigned char* tile, int size, SourceOf source_of) {
  using Tile = SharedTile<columns>;
  // Neighbouring threads take neighbouring chunks, as many as a power of two allows.
  constexpr int kAcross = Tile::kChunks & -Tile::kChunks;
  constexpr int kStep = threads / kAcross;
  static_assert(rows % kStep == 0 && kStep % 8 == 0, "every thread copies as many rows");
  const unsigned thread = ptx::forget_origin(static_cast<int>(threadIdx.x));
  const int first_row = static_cast<int>(thread / kAcross), chunk = static_cast<int>(thread % kAcross);
  unsigned char* const target = tile + Tile::offset(first_row, chunk);
#pragma unroll
  for (int row = rows - kStep; row >= 0; row -= kStep) {
    const RowSource source = source_of(first_row + row);
#pragma unroll
    for (int right = 0; right < Tile::kChunks; right += kAcross) {
      ptx::cp_async<16>(target + row * Tile::kRowBytes + 16 * right, source.data + 16 * (chunk + right),
                        source.exists && 8 * (chunk + right) < size ? 16 : 0);
    }
  }
}

}  // namespace pykern
